"""What needs no server: keys, tables, loading, help."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from capsule.__main__ import SERVER_COMMANDS, main
from capsule.cli import output, patience
from capsule.cli.commands import COMMANDS
from capsule.cli.escapes import Action, Escapes
from capsule.cli.failures import Failure
from capsule.cli.processes import signal_name
from capsule.cli.progress import Progress
from capsule.client import ApiError, ConnectionLost, StreamClosed

EVERYTHING = {**COMMANDS, **SERVER_COMMANDS}


def feed(escapes, *pieces):
    passed, actions = b"", []
    for piece in pieces:
        more, done = escapes.feed(piece)
        passed, actions = passed + more, actions + done
    return passed, actions


@pytest.mark.parametrize(
    ("keys", "passed", "actions"),
    [
        (b"~.", b"", [Action.DETACH]),
        (b"ls\r~.", b"ls\r", [Action.DETACH]),
        (b"ls\n~?x", b"ls\nx", [Action.HELP]),
        (b"a~.", b"a~.", []),
        (b"~~.", b"~.", []),
        (b"~x~.", b"~x~.", []),
        (b"\r~\r~.", b"\r~\r", [Action.DETACH]),
        (b"~?~.", b"", [Action.HELP, Action.DETACH]),
    ],
)
def test_escapes(keys, passed, actions):
    """At the start of a line only; doubled it is itself; however the keys are cut."""
    assert feed(Escapes(), keys) == (passed, actions)
    assert feed(Escapes(), *(bytes([key]) for key in keys)) == (passed, actions)


@given(st.binary(), st.lists(st.integers(0, 50)))
def test_no_key_is_lost_or_made_up(keys, cuts):
    """Whatever is typed without the escape character, in whatever pieces, is sent; and everything with none."""
    places = sorted({0, len(keys), *(cut for cut in cuts if cut < len(keys))})
    pieces = [keys[a:b] for a, b in itertools.pairwise(places)]
    assert feed(Escapes(None), *pieces) == (keys, [])
    plain = keys.replace(b"~", b"")
    assert feed(Escapes(), *(piece.replace(b"~", b"") for piece in pieces)) == (plain, [])


def test_tables_cannot_be_forged():
    """Names of others do not steer the terminal, nor add lines."""
    assert output.table(("A", "LONGER"), [("x\x1b[2J\n", "y"), ("wide cell", "z")]) == (
        "A          LONGER\nx\ufffd[2J\ufffd     y\nwide cell  z"
    )
    assert output.fields([("a", "1\n2"), ("longer", None), ("b", 0)]) == "a:  1\ufffd2\nb:  0"


def test_ages_and_sizes():
    now = datetime.now(UTC)
    assert [output.ago(now - timedelta(seconds=s), now) for s in (-5, 59, 60, 7200, 200_000)] == (
        ["0s", "59s", "1m", "2h", "2d"]
    )
    assert [output.size(n) for n in (0, 1023, 1024, 5 << 30)] == ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]


def test_progress_lines():
    shown = Progress("name", shown=False)
    assert shown.line(512, 1024, 1.0) == "name  [############------------]  50%  512 B  512 B/s"
    assert shown.line(512, None, 2.0) == "name  512 B  256 B/s"
    assert shown.line(0, 0, 0.0) == "name  0 B  "
    assert shown.line(10, 5, 1.0).startswith("name  [########################] 100%")


def test_names_of_signals():
    assert [signal_name(text) for text in ("term", "SIGKILL", "9")] == ["SIGTERM", "SIGKILL", "9"]
    with pytest.raises(Failure, match="is not a signal"):
        signal_name("nonsense")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ConnectionLost("x"), True),
        (StreamClosed(1001, "x"), True),
        (StreamClosed(4503, "x", "host_unavailable"), True),
        (StreamClosed(4409, "x", "invalid_state"), False),
        (StreamClosed(1011, "x"), False),
        (ApiError(503, "host_unavailable", "x"), True),
        (ApiError(404, "not_found", "x"), False),
    ],
)
def test_what_is_tried_again(error, lost):
    """The way, not the question."""
    assert patience.is_loss(error) is lost


async def test_patience_ends(autojump_clock):
    """After ten minutes without the connection; and begins anew when it was there."""
    waiting = patience.Patience()
    attempts = 0
    while await waiting.wait():
        attempts += 1
    assert 110 < attempts < 300
    waiting.restored()
    assert await waiting.wait()


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_the_list_of_commands_is_true(name):
    """Each is where the table says, and helps; nested ones, too."""
    command = EVERYTHING[name].load()
    assert command.name == name
    paths = [[name]]
    if isinstance(command, click.Group):
        paths += [[name, nested] for nested in command.list_commands(click.Context(command))]
    for path in paths:
        result = CliRunner().invoke(main, [*path, "--help"])
        assert result.exit_code == 0
        assert "Usage:" in result.output


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"completion"}))
def test_every_command_has_json(name):
    command = COMMANDS[name].load()
    found = (
        [command.get_command(None, one) for one in command.commands] if isinstance(command, click.Group) else [command]
    )
    assert all("as_json" in {parameter.name for parameter in one.params} for one in found)


WITHOUT_THE_PLATFORM = """
import sys
for name in ("quart", "quart_trio", "hypercorn", "asyncpg", "argon2", "prometheus_client", "jwt", "redis", "uvloop",
             "yaml", "email_validator", "multipart", "structlog", "cryptography", "dotenv", "agent"):
    sys.modules[name] = None
sys.argv = ["capsule", *sys.argv[1:]]
from capsule.__main__ import main
main()
"""


def test_it_works_with_the_client_extra_alone():
    """Sandboxes need nothing of the platform; its own commands say what is missing."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_THE_PLATFORM, *arguments],
            capture_output=True, text=True, check=False, timeout=90, env={"HOME": "/nonexistent"},
        )  # fmt: skip

    assert "no server is known" in run("sandbox", "ls").stderr
    for name in COMMANDS:
        assert run(name, "--help").returncode == 0, name
    assert run("--help").returncode == 0
    assert run("serve", "--help").returncode != 0


def test_a_library_that_is_missing_is_named(monkeypatch):
    """In a line, with what to install."""

    def missing(_name):
        raise ModuleNotFoundError("No module named 'quart'", name="quart")

    monkeypatch.setattr(importlib, "import_module", missing)
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 125
    assert (
        result.output
        == "capsule: `capsule serve` needs quart, which is not installed: pip install 'capsule[control]'\n"
    )


def test_it_starts_quickly():
    """Half a second at most, of a processor's time: scripts call it many times. Nothing of the platform is loaded."""
    spent = []
    for _ in range(5):
        before = os.times()
        listed = "import sys; from capsule.__main__ import COMMANDS; COMMANDS['exec'].load(); print(*sys.modules)"
        ran = subprocess.run([sys.executable, "-c", listed], check=True, capture_output=True, text=True)
        after = os.times()
        assert not {"anyio", "quart", "asyncpg", "structlog", "agent", "capsule.control", "capsule.http"} & set(
            ran.stdout.split()
        )
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < 0.8  # 0.35 on a machine that has nothing else to do; the first one may have compiled it


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_CAPSULE_COMPLETE" in result.output
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=result.output, text=True, check=True)
