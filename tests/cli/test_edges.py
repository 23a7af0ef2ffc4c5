"""The command line at its edges: signals that are to be ignored, pipes that stand still, names that are no text."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import trio

from tests.cli.platform import SANDBOX

SB = SANDBOX[:9]


def _ignore_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


async def test_nohup_holds(started, until, platform):
    """A SIGHUP that we were told to ignore is not handed on: the process outlives the terminal's end."""
    process = started(
        "exec", SB, "--", "sh", "-c", "echo ready; read x; echo $x", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        preexec_fn=_ignore_hangups,
    )  # fmt: skip
    with trio.fail_after(60):
        assert await trio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True) == b"ready\n"
        process.send_signal(signal.SIGHUP)
        out, _ = await trio.to_thread.run_sync(process.communicate, b"still\n", abandon_on_cancel=True)
    assert (process.returncode, out) == (0, b"still\n")


@pytest.mark.parametrize(
    ("closed", "words", "code", "seen"),
    [
        (0, ("exec", SB, "--", "sh", "-c", "cat; echo end"), 0, (b"end\n", b"")),
        (1, ("exec", SB, "--", "echo", "x"), 125, (b"", b"capsule: Bad file descriptor\n")),
        (1, ("sandbox", "ls"), 125, (b"", b"capsule: our output is closed\n")),
        (2, ("exec", SB, "--", "sh", "-c", "echo err >&2"), 125, (b"", b"")),
    ],
)
async def test_a_stream_that_is_closed_is_nothing_else(started, closed, words, code, seen):
    """`<&-`, `>&-`: never the connection to the server, which would have the lowest number that is free."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = started(*words, preexec_fn=lambda: os.close(closed), **pipes)
    with trio.fail_after(60):
        found = await trio.to_thread.run_sync(process.communicate, abandon_on_cancel=True)
    assert (process.returncode, found) == (code, seen)


@pytest.mark.parametrize("arguments", [(f"{SB}:/x", "pipe"), ("pipe", f"{SB}:/x")])
async def test_a_pipe_that_stands_still_can_be_interrupted(started, platform, tmp_path, until, arguments):
    """Nobody reads it, or writes to it: Ctrl-C ends us all the same."""
    (platform.root / "x").write_bytes(bytes(1_000_000))
    os.mkfifo(tmp_path / "pipe")
    process = started("cp", *arguments, stderr=subprocess.PIPE)
    await until(lambda: any("/files/" in path for _, path in platform.asked))
    held = await _hold(tmp_path / "pipe")
    if arguments[0] != "pipe":
        await until(lambda: any("/files/stream/read" in path for _, path in platform.asked))
    process.send_signal(signal.SIGINT)
    await until(lambda: process.poll() is not None)
    os.close(held)
    assert process.returncode == -signal.SIGINT


async def _hold(pipe):
    """Its other end, without ever using it; it is open on both sides then."""
    return await trio.to_thread.run_sync(os.open, pipe, os.O_RDWR)


async def test_names_that_are_not_text(capsule, platform, tmp_path):
    """A local name of any bytes is copied, and JSON stays JSON; in a sandbox they cannot be, which is said."""
    name = os.fsdecode(b"\xff")
    (tmp_path / name).write_text("x")
    code, out, _ = await capsule("cp", "--json", name, f"{SB}:/x")
    assert (code, json.loads(out)["source"]) == (0, "\ufffd")
    code, _, err = await capsule("cp", name, f"{SB}:/{name}")
    assert (code, err) == (125, "capsule: '/\\udcff' is not UTF-8, as names and arguments in a sandbox are\n")


async def test_a_detached_terminal_in_json(capsule, platform):
    """One document, as for other processes."""
    code, out, _ = await capsule("exec", "-t", "-d", "--json", SB, "sleep", "100")
    said = json.loads(out)
    assert (code, said["pid"]) == (0, platform.jobs[0].pid)
    assert re.fullmatch("pty-[0-9a-f]{8}", said["tag"])


async def test_a_damaged_file_does_not_stop_a_login(capsule_without_key, tmp_path, environment):
    """`capsule login` is what its message says to do."""
    path = tmp_path / ".config" / "capsule" / "credentials.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    code, _, err = await capsule_without_key("login", "--api-key-stdin", stdin=b"cap_x\n")
    assert "run `capsule login` again" not in err
    assert (code, "not reached" in err or "unauthorized" in err) == (125, True)


WITHOUT_UNIX = """
import sys
for name in ("termios", "tty", "fcntl", "pwd", "grp", "resource"):
    sys.modules[name] = None
import os, signal
del os.fchmod, os.O_DIRECTORY, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT
import capsule.client
from capsule.__main__ import main
main()
"""


def test_where_there_is_no_unix():
    """The library is there; commands that need a terminal's modes say that they do not work."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_UNIX, *arguments],
            capture_output=True, text=True, check=False, timeout=90, env={"HOME": "/nonexistent"},
        )  # fmt: skip

    assert run("sandbox", "ls", "--help").returncode == 0
    assert run("cp", "--help").returncode == 0
    assert run("exec", "--help").stderr == "capsule: `capsule exec` does not work on this system: it has no termios\n"
