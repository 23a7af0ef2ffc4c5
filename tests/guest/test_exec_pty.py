"""Terminals: what a program finds there, sizes, keys, and what is left when the terminal goes."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from agent.wire.messages import Cancel, Credit, Data, End

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="exec as root is the default, which needs root")

SIZE = {"cols": 91, "rows": 33}
SHELL = {"cmd": "bash", "args": ["--norc", "--noprofile", "-i"], "envs": {"PS1": "$ "}, "pty": SIZE}

TELL_SIZES = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
print("ready", flush=True)
while signal.sigwait([signal.SIGWINCH]):
    print(*os.get_terminal_size(), flush=True)
"""


def terminal(client, **body):
    """Open one: (stream, notice)."""
    stream = client.open("exec", {"pty": SIZE, **body})
    return stream, client.notice(stream)


def read_until(client, stream, word, got=b""):
    """Output up to where `word` has come."""
    while word not in got:
        frame = client.stream_frame(stream)
        assert isinstance(frame, Data), (frame, got)
        assert frame.channel == 1
        got += frame.data
        client.send(Credit(stream, len(frame.data)))
    return got


def type_in(client, stream, text):
    client.send(Data(stream, 0, text))


def session(pid):
    """Every process of a session that is no zombie."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == pid and fields[0] != "Z":
                found.add(int(path.parent.name))
    return found


def test_a_program_finds_a_terminal(client):
    """On all three descriptors, as its controlling one, of the size asked for; TERM is set; it leads its session."""
    script = (
        "tty; stty size; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo three; echo $TERM; echo hi > /dev/tty; echo $$ >&2"
    )
    outcome = client.call("exec", {"cmd": script, "pty": SIZE})
    lines = outcome.stdout.split(b"\r\n")
    pid = outcome.notices[0]["pid"]
    assert re.fullmatch(rb"/dev/pts/\d+", lines[0])
    assert lines[1:] == [b"33 91", b"three", b"xterm-256color", b"hi", str(pid).encode(), b""]
    assert outcome.stderr == b""
    assert outcome.reply["exit_code"] == 0


def test_term_can_be_chosen(client):
    """By the envs of the exec."""
    assert client.call("exec", {"cmd": "echo $TERM", "pty": SIZE, "envs": {"TERM": "dumb"}}).stdout == b"dumb\r\n"


def test_without_a_command_it_is_the_login_shell(client):
    """The user's own; its name begins with '-', also in the list. One who has none is told so."""
    stream, notice = terminal(client, envs={"PS1": "$ ", "HOME": "/nowhere"}, tag="login")
    [entry] = client.call("processes.list").reply["processes"]
    assert entry["cmd"].startswith("-")
    type_in(client, stream, b"echo name=$0\n")
    read_until(client, stream, b"name=" + entry["cmd"].encode() + b"\r\n")
    type_in(client, stream, b"exit 5\n")
    assert client.finish(stream).reply["exit_code"] == 5
    assert client.call("processes.list").reply["processes"] == []
    assert notice["tag"] == "login"
    outcome = client.call("exec", {"user": "nobody", "pty": SIZE})
    assert outcome.reply["exit_code"] != 0


def test_the_terminal_belongs_to_the_user(client):
    """Its programs open it by name."""
    outcome = client.call(
        "exec", {"cmd": 'echo mine > "$(tty)"; stat -c %U:%a "$(tty)"', "user": "nobody", "pty": SIZE}
    )
    assert outcome.stdout.splitlines() == [b"mine", b"nobody:600"] or b"nobody:620" in outcome.stdout


def test_a_new_size_arrives(client):
    """SIGWINCH, and the terminal says the new one."""
    stream, notice = terminal(client, cmd=sys.executable, args=["-c", TELL_SIZES])
    read_until(client, stream, b"ready")
    for cols, rows in ((4096, 4096), (1, 1), (80, 25)):
        assert client.call("processes.resize", {"process": notice["pid"], "cols": cols, "rows": rows}).reply == {}
        read_until(client, stream, f"{cols} {rows}\r\n".encode())
    client.send(Cancel(stream))
    client.call("processes.signal", {"process": notice["pid"], "signal": 9})


def test_control_characters_are_signals(client):
    """0x03 interrupts the job in the foreground and not the shell; 0x04 ends it."""
    stream = client.open("exec", SHELL)
    client.notice(stream)
    read_until(client, stream, b"$ ")
    type_in(client, stream, b"echo begin; cat\n")
    read_until(client, stream, b"begin\r\n")
    type_in(client, stream, b"hello\n")
    read_until(client, stream, b"hello\r\nhello\r\n")
    type_in(client, stream, b"\x03")
    read_until(client, stream, b"$ ")
    type_in(client, stream, b"echo code=$?\n")
    rest = read_until(client, stream, b"code=130\r\n").partition(b"code=130\r\n")[2]
    read_until(client, stream, b"$ ", rest)  # before, the shell reads in another mode
    type_in(client, stream, b"\x04")
    assert client.finish(stream).reply["exit_code"] == 0


def test_end_does_nothing_to_a_terminal(client):
    """END; and who may still send nothing is still answered."""
    stream, notice = terminal(client, cmd="echo on; read x")
    client.send(End(stream))
    read_until(client, stream, b"on\r\n")
    assert client.call("processes.list").reply["processes"][0]["pid"] == notice["pid"]
    client.call("processes.signal", {"process": notice["pid"], "signal": 1})
    assert client.finish(stream).reply["signal"] == 1


def test_kill_ends_every_job_of_the_terminal(client, until):
    """Also those in groups of their own, and those that ignore the hang-up."""
    stream = client.open("exec", SHELL)
    pid = client.notice(stream)["pid"]
    type_in(client, stream, b"nohup sleep 1000 & sleep 1001 & (trap '' HUP TERM; sleep 1002) & echo three=3\n")
    read_until(client, stream, b"three=3\r\n")
    until(lambda: len(session(pid)) >= 4, "all of them run")
    assert client.call("processes.signal", {"process": pid, "signal": 9}).reply == {}
    assert client.finish(stream).reply["signal"] == 9
    until(lambda: not session(pid), "nothing is left of the session")


def test_time_out_ends_every_job_of_the_terminal(client, until):
    """`timeout_ms`, as kill."""
    stream = client.open("exec", {**SHELL, "timeout_ms": 1500})
    pid = client.notice(stream)["pid"]
    type_in(client, stream, b"nohup sleep 1000 & nohup sleep 1001 &\n")
    reply = client.finish(stream).reply
    assert (reply["timed_out"], reply["exit_code"]) == (True, 137)
    until(lambda: not session(pid), "nothing is left of the session")


def test_grandchildren_that_hold_the_terminal_delay_nothing(client, until):
    """The exec ends with the process that leads."""
    began = time.monotonic()
    outcome = client.call("exec", {"cmd": "trap '' HUP; sleep 1000 & echo started", "pty": SIZE})
    assert time.monotonic() - began < 10
    assert outcome.reply["exit_code"] == 0
    for pid in session(outcome.notices[0]["pid"]):
        os.kill(pid, 9)


def test_all_that_was_printed_comes_before_the_reply(client):
    """More than any buffer between; nothing is lost at the end."""
    for _ in range(5):
        outcome = client.call("exec", {"cmd": "seq 100000", "pty": SIZE})
        assert outcome.stdout == b"".join(b"%d\r\n" % number for number in range(1, 100_001))
        assert outcome.reply["exit_code"] == 0


def test_much_input_arrives_whole(client):
    """Into a raw terminal, faster than it is read: nothing is lost and nothing is held up for good."""
    data = bytes(range(256)) * 2048
    stream, _ = terminal(client, cmd=f"stty raw -echo; echo ready; head -c {len(data)} | sha256sum")
    read_until(client, stream, b"ready")
    credit, at = 262144, 0
    while at < len(data):
        size = min(65536, credit, len(data) - at)
        if size > 0:
            type_in(client, stream, data[at : at + size])
            credit, at = credit - size, at + size
            continue
        frame = client.stream_frame(stream)
        if isinstance(frame, Credit):
            credit += frame.amount
    assert hashlib.sha256(data).hexdigest().encode() in client.finish(stream).stdout


def test_a_terminal_that_nobody_reads_blocks_nobody(client, guest, until):
    """Neither its output nor input that its program does not take; others are served, and the loop sleeps."""
    slow = guest.connect(initial_credit=1000)
    stream, notice = terminal(slow, cmd="yes")
    deaf, sleeper = terminal(client, cmd="stty raw -echo; echo ready; sleep 1000")
    read_until(client, deaf, b"ready")
    for _ in range(4):
        type_in(client, deaf, b"x" * 65536)
    assert client.call("exec", {"cmd": "echo hello", "pty": SIZE}).stdout == b"hello\r\n"

    def sleeps():
        before = guest.cpu_seconds()
        time.sleep(0.5)
        return guest.cpu_seconds() - before < 0.1

    until(sleeps, "the loop sleeps")
    for process in (notice["pid"], sleeper["pid"]):
        client.call("processes.signal", {"process": process, "signal": 9})
    assert client.finish(deaf).reply["signal"] == 9
    assert slow.finish(stream).reply["signal"] == 9


def test_two_hundred_at_once(client, guest, until):
    """Each echoes its own; afterwards no descriptor and no process is left."""
    before = guest.descriptors()
    streams = [terminal(client, cmd="read x; echo got $x")[0] for _ in range(200)]
    for number, stream in enumerate(streams):
        type_in(client, stream, b"%d\n" % number)
    for number, stream in enumerate(streams):
        outcome = client.finish(stream)
        assert b"got %d\r\n" % number in outcome.stdout
        assert outcome.reply["exit_code"] == 0
    until(lambda: guest.children() == {}, "no children")
    until(lambda: guest.descriptors() <= before, "no descriptors")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"args": []},
        {"args": ["x"], "pty": SIZE},
        {"cmd": "", "pty": SIZE},
        *[{"cmd": "true", "pty": pty} for pty in (True, {}, [], {"cols": 80}, {"cols": 0, "rows": 1})],
        {"cmd": "true", "pty": {"cols": 4097, "rows": 1}},
        {"cmd": "true", "pty": {"cols": "80", "rows": 24}},
        {"cmd": "true", "detach": 1},
    ],
)
def test_wrong_bodies(client, body):
    """Told before anything is started."""
    assert client.call("exec", body).fault == "invalid_argument"


def test_wrong_sizes(client):
    """Of none that runs, of one without a terminal, of sizes that are none."""
    stream = client.open("exec", {"cmd": "sleep 1000"})
    pid = client.notice(stream)["pid"]
    resize = "processes.resize"
    assert client.call(resize, {"process": pid, "cols": 5, "rows": 5}).fault == "invalid_argument"
    assert client.call(resize, {"process": "none", "cols": 5, "rows": 5}).fault == "not_found"
    for size in ({}, {"cols": 5}, {"cols": 0, "rows": 5}, {"cols": 5, "rows": 4097}, {"cols": 5, "rows": "5"}):
        assert client.call(resize, {"process": pid, **size}).fault == "invalid_argument"
