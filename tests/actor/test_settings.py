"""Settings: where values come from, and errors that name the variable."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from agent.actor.settings import SettingsError, environment, load_settings


class Sample(msgspec.Struct, frozen=True):
    database_url: str
    port: int = 8080
    ratio: float = 0.5
    debug: bool = False
    level: Literal["info", "debug"] = "info"
    token: str | None = None


def load(**values: str) -> Sample:
    return load_settings(Sample, {"X_DATABASE_URL": "db", **values}, prefix="X_")


def test_values_are_converted():
    """Text from the environment becomes what the field is."""
    settings = load(X_PORT="80", X_RATIO="0.25", X_DEBUG="true", X_LEVEL="debug", X_TOKEN="t")
    assert settings == Sample("db", 80, 0.25, True, "debug", "t")


def test_defaults_and_empty_values():
    """A variable that is empty counts as absent; other programs' variables do not matter."""
    assert load(X_PORT="", X_TOKEN="", PORT="1", Y_PORT="2") == Sample("db")


@pytest.mark.parametrize(
    ("name", "value"), [("X_PORT", "eighty"), ("X_RATIO", "x"), ("X_DEBUG", "maybe"), ("X_LEVEL", "loud")]
)
def test_a_value_that_does_not_fit_names_its_variable(name, value):
    """The message is for whoever sets it."""
    with pytest.raises(SettingsError, match=f"^{name}: "):
        load(**{name: value})


@pytest.mark.parametrize("values", [{}, {"X_DATABASE_URL": ""}])
def test_a_missing_value_names_its_variable(values):
    """Required means required."""
    with pytest.raises(SettingsError, match=r"^X_DATABASE_URL is not set$"):
        load_settings(Sample, values, prefix="X_")


def test_the_environment_wins_over_dotenv(tmp_path, monkeypatch):
    """`.env` lies beneath the real environment."""
    dotenv = tmp_path / ".env"
    dotenv.write_text('X_DATABASE_URL=file\nX_PORT="81"\nX_NOVALUE\n# comment\n')
    monkeypatch.setenv("X_DATABASE_URL", "real")
    monkeypatch.delenv("X_PORT", raising=False)
    values = environment(dotenv)
    assert load_settings(Sample, values, prefix="X_") == Sample("real", 81)
    assert "X_NOVALUE" not in values


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path / "missing", lambda path: path])
def test_no_dotenv_is_no_error(tmp_path, monkeypatch, make):
    """None, a file that is not there, a directory: the environment alone."""
    monkeypatch.setenv("X_PORT", "7")
    assert environment(make(tmp_path))["X_PORT"] == "7"
