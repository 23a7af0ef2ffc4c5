"""Logs: one event a line, bound ids in it, secrets not."""

from __future__ import annotations

import json

import pytest
import structlog

from agent.actor.logs import SECRET_WORDS, configure_logs, mask_secrets


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_json_lines(capsys):
    """Each event is one JSON object on standard error with time, level and the ids that are bound."""
    configure_logs(json=True)
    with structlog.contextvars.bound_contextvars(sandbox_id="sb-1"):
        structlog.get_logger().info("sandbox_started", took=3)
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert event == {"event": "sandbox_started", "level": "info", "sandbox_id": "sb-1", "took": 3}


@pytest.mark.parametrize("as_json", [True, False])
def test_a_traceback_has_no_locals(capsys, as_json):
    """An exception is logged with its traceback, but not with the variables that were around it."""
    configure_logs(json=as_json)

    def fail() -> None:
        local = "hunter2"
        raise ValueError(len(local))

    try:
        fail()
    except ValueError:
        structlog.get_logger().exception("task_failed")
    text = capsys.readouterr().err
    assert "ValueError: 7" in text
    assert "in fail" in text
    assert "'hunter2'" not in text


def test_the_level_filters(capsys):
    """Below the level nothing is written."""
    configure_logs(level="warning")
    structlog.get_logger().info("unimportant")
    structlog.get_logger().warning("important", k=1)
    text = capsys.readouterr().err
    assert "unimportant" not in text
    assert "important" in text


def test_a_level_that_does_not_exist():
    """Is said at once."""
    with pytest.raises(KeyError):
        configure_logs(level="loud")


@pytest.mark.parametrize("word", SECRET_WORDS)
@pytest.mark.parametrize("form", ["{}", "X_{}_2", "HOST_{}"])
def test_secrets_are_masked(word, form):
    """Every key that names a secret, however it is written; others are left alone."""
    event = {"event": "e", form.format(word).upper(): "s3cret", form.format(word): ["s3cret"], "sandbox": "sb"}
    masked = mask_secrets(None, "info", event)
    assert "s3cret" not in repr(masked)
    assert masked["sandbox"] == "sb"
    assert masked["event"] == "e"


@pytest.mark.parametrize("as_json", [True, False])
def test_secrets_are_masked_in_what_is_written(capsys, as_json):
    """The processor is in the chain."""
    configure_logs(json=as_json)
    structlog.get_logger().info("key_made", api_key="s3cret")
    assert "s3cret" not in capsys.readouterr().err
