"""Processes that outlive their streams: what detaches them, what ends them, what is kept of their end."""

from __future__ import annotations

import os

import msgspec
import pytest

from agent.guest.client import MAX_GUEST_FRAME_BYTES
from agent.wire.messages import Cancel, Credit, Data, End

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="exec as root is the default, which needs root")

SIZE = {"cols": 80, "rows": 24}


def start(client, cmd, **body):
    """A detached exec: (stream, pid)."""
    stream = client.open("exec", {"cmd": cmd, "detach": True, **body})
    return stream, client.notice(stream)["pid"]


def attach(client, process, **body):
    """(stream, notice)."""
    stream = client.open("processes.attach", {"process": process, **body})
    return stream, client.notice(stream)


def pids(client):
    return [entry["pid"] for entry in client.call("processes.list").reply["processes"]]


def test_while_attached_it_is_like_any_exec(client):
    """Both channels, stdin with END, exit code, duration."""
    outcome = client.upload(
        {"cmd": "cat; echo err >&2; exit 3", "stdin": True, "detach": True}, b"in" * 99, method="exec"
    )
    assert (outcome.stdout, outcome.stderr) == (b"in" * 99, b"err\n")
    assert outcome.notices == [{"pid": outcome.notices[0]["pid"]}]
    assert outcome.reply.pop("duration_ms") >= 0
    assert outcome.reply == {"exit_code": 3, "timed_out": False}


@pytest.mark.parametrize("extra", [{"detach": True}, {"pty": SIZE}, {"pty": SIZE, "detach": True}])
@pytest.mark.parametrize("how", ["cancel", "lost"])
def test_it_outlives_its_stream(guest, client, extra, how):
    """CANCEL and a lost connection only detach it; it goes on, and its input stays open."""
    first = guest.connect()
    body = {"cmd": "read x; echo got $x; read y; echo got $y", "stdin": True, "tag": "t", **extra}
    stream = first.open("exec", body)
    pid = first.notice(stream)["pid"]
    first.send(Data(stream, 0, b"one\n"))
    while b"got one" not in (frame := first.stream_frame(stream)).data:
        assert frame.channel == 1
    if how == "cancel":
        first.send(Cancel(stream))
        assert first.finish(stream).fault == "cancelled"
    else:
        first.close()
    assert pids(client) == [pid]
    stream, notice = attach(client, "t")
    assert notice.pop("replay") >= len(b"got one\n")
    assert notice.pop("ended") is False
    assert notice == {"pid": pid, "tag": "t", "pty": "pty" in extra, "offset": 0, "skipped": 0}
    client.send(Data(stream, 0, b"two\n"))
    outcome = client.finish(stream)
    assert outcome.stdout.replace(b"\r", b"").replace(b"two\n", b"", "pty" in extra).endswith(b"got one\ngot two\n")
    assert outcome.reply["exit_code"] == 0


def test_the_streams_deadline_only_detaches(client):
    """OPEN's timeout_ms is the stream's; `timeout_ms` in the body the process's."""
    stream = client.open("exec", {"cmd": "sleep 1000", "detach": True}, timeout_ms=100)
    pid = client.notice(stream)["pid"]
    assert client.finish(stream).fault == "deadline_exceeded"
    assert pids(client) == [pid]
    stream = client.open("processes.attach", {"process": pid}, timeout_ms=100)
    client.notice(stream)
    assert client.finish(stream).fault == "deadline_exceeded"
    assert pids(client) == [pid]


def test_its_own_time_out_ends_it(client, until):
    """Also when nobody is attached; who attaches later is told."""
    stream, pid = start(client, "sleep 1000", timeout_ms=300)
    client.send(Cancel(stream))
    client.finish(stream)
    until(lambda: pids(client) == [], "it has ended")
    stream, _ = attach(client, pid)
    reply = client.finish(stream).reply
    assert (reply["exit_code"], reply["signal"], reply["timed_out"]) == (137, 9, True)


@pytest.mark.parametrize(("cmd", "code", "number"), [("exit 7", 7, None), ("kill -SEGV $$", 139, 11)])
@pytest.mark.parametrize("extra", [{"detach": True}, {"pty": SIZE}])
def test_its_end_and_its_last_output_are_kept(guest, client, until, cmd, code, number, extra):
    """By pid and by tag, again and again."""
    first = guest.connect()
    stream = first.open("exec", {"cmd": f"sleep 0.2; echo bye; {cmd}", "tag": "t", **extra})
    pid = first.notice(stream)["pid"]
    first.close()
    until(lambda: pids(client) == [], "it has ended")
    for process in (pid, "t", pid):
        stream, notice = attach(client, process)
        outcome = client.finish(stream)
        assert (notice["pid"], notice["offset"], outcome.stdout.strip()) == (pid, 0, b"bye")
        assert (outcome.reply["exit_code"], outcome.reply.get("signal")) == (code, number)
        assert outcome.reply["timed_out"] is False


def test_the_tag_of_one_that_ended_is_free_and_names_the_last(client, until):
    """Attaching finds the one that runs, else the one that ended last."""
    for word in ("first", "second"):
        assert client.call("exec", {"cmd": f"echo {word}", "detach": True, "tag": "t"}).reply
    stream, _ = attach(client, "t")
    assert client.finish(stream).stdout == b"second\n"
    stream, pid = start(client, "echo third; sleep 1000", tag="t")
    other, notice = attach(client, "t", observe=True)
    assert notice["pid"] == pid
    assert client.stream_frame(other).data == b"third\n"


def test_sixty_four_ends_are_kept(guest, client, until):
    """The oldest goes first; one that somebody reads stays; nothing of them is left but that."""
    found = [client.call("exec", {"cmd": "true", "detach": True}) for _ in range(3)]
    held = guest.connect(initial_credit=0)
    reading = held.open("processes.attach", {"process": found[0].notices[0]["pid"]})
    held.call("info")
    ended = [outcome.notices[0]["pid"] for outcome in found]
    ended += [client.call("exec", {"cmd": "true", "detach": True}).notices[0]["pid"] for _ in range(64)]
    for pid in ended[1:4]:
        assert client.call("processes.attach", {"process": pid}).fault == "not_found"
    for pid in (ended[0], ended[-1], ended[5]):
        assert client.call("processes.attach", {"process": pid, "observe": True}).reply["exit_code"] == 0
    held.send(Credit(reading, 1000))
    assert held.finish(reading).reply["exit_code"] == 0
    assert guest.children() == {}
    assert client.call("info").reply["processes"] == 0


def test_ended_ones_take_no_place(client):
    """More than may run have ended, and one more may start."""
    for _ in range(300):
        assert client.call("exec", {"cmd": "true", "detach": True}).reply
    streams = [client.open("exec", {"cmd": "sleep 1000", "detach": True}) for _ in range(256)]
    for stream in streams:
        client.notice(stream)
    assert client.call("exec", {"cmd": "true", "detach": True}).fault == "too_many_processes"
    assert client.call("exec", {"cmd": "true", "pty": SIZE}).fault == "too_many_processes"
    assert client.call("exec", {"cmd": "true"}).reply["exit_code"] == 0


def test_what_never_started_is_not_kept(client):
    """The stream is told; nobody finds it."""
    assert client.call("exec", {"cmd": "true", "detach": True, "tag": "t", "user": "nosuchuser"}).fault == "not_found"
    assert client.call("processes.attach", {"process": "t"}).fault == "not_found"
    assert client.call("exec", {"cmd": "true", "pty": SIZE, "tag": "t", "cwd": "/none"}).fault == "not_found"
    assert client.call("processes.attach", {"process": "t"}).fault == "not_found"


def test_a_program_that_cannot_start_is(client):
    """127 with its reason, as in a shell."""
    client.call("exec", {"cmd": "/no/such", "args": [], "detach": True, "tag": "t"})
    stream, _ = attach(client, "t")
    outcome = client.finish(stream)
    assert outcome.reply["exit_code"] == 127
    assert b"No such file" in outcome.stderr


def test_nobody_attached_means_nothing_waits(client, until, tmp_path):
    """Far more than the ring, on both channels; the last 64 KiB are there."""
    done = tmp_path / "done"
    stream, pid = start(client, f"sleep 0.2; head -c 4000000 /dev/zero; seq 100000 >&2; touch {done}")
    client.send(Cancel(stream))
    client.finish(stream)
    until(done.exists, "it has printed everything")
    until(lambda: pids(client) == [], "it has ended")
    whole = b"".join(b"%d\n" % number for number in range(1, 100_001))
    stream, notice = attach(client, pid, offset=0)
    outcome = client.finish(stream)
    assert notice["skipped"] == notice["offset"] == 4_000_000 + len(whole) - 65536
    assert outcome.stderr == whole[-65536:]


def test_grandchildren_of_one_that_ended_do_not_block(client, until, running, tmp_path):
    """The end is told after the grace; what they print afterwards is nobody's, and does not hold them up."""
    done, go = tmp_path / "done", tmp_path / "go"
    wait = f"while [ ! -e {go} ]; do sleep 0.05; done"
    stream, pid = start(client, f"({wait}; head -c 4000000 /dev/zero; touch {done}) & echo now")
    outcome = client.finish(stream)
    assert (outcome.stdout, outcome.reply["exit_code"]) == (b"now\n", 0)
    go.touch()
    until(done.exists, "the grandchild has printed everything")
    stream, _ = attach(client, pid)
    assert client.finish(stream).stdout == b"now\n"


def test_signals_reach_it_by_tag(client):
    """Also while nobody is attached."""
    stream, _ = start(client, "trap 'echo caught; exit 5' TERM; echo ready; sleep 1000 & wait", tag="t")
    assert client.stream_frame(stream).data == b"ready\n"
    client.send(Cancel(stream))
    client.finish(stream)
    assert client.call("processes.signal", {"process": "t", "signal": 15}).reply == {}
    stream, notice = attach(client, "t", offset=6)
    outcome = client.finish(stream)
    assert (notice["offset"], notice["skipped"]) == (6, 0)
    assert (outcome.stdout, outcome.reply["exit_code"]) == (b"caught\n", 5)


def test_the_list_fits_one_frame(client, tmp_path):
    """The most processes, with the longest of everything: all are told, each in part."""
    cwd = os.fsencode(tmp_path)
    for _ in range(10):
        cwd += b"/" + b"\xff\xc3" * 100  # no UTF-8
        os.mkdir(cwd)  # noqa: PTH102
    link = tmp_path / "link"
    os.symlink(cwd, link)  # noqa: PTH211
    body = {"args": ["-c", "sleep 1000; true", *["é" * 2000] * 3], "cwd": str(link)}
    for number in range(512):
        tag = f"{number:03}".ljust(128, "t")
        stream = client.open("exec", {**body, "cmd": "sh", "detach": number % 2 == 0, "tag": tag})
        client.notice(stream)
    reply = client.call("processes.list").reply
    assert len(reply["processes"]) == 512
    assert len(msgspec.msgpack.encode(reply)) < MAX_GUEST_FRAME_BYTES - 64
    assert all(entry["cmd"] for entry in reply["processes"])


def test_end_on_a_stream_without_stdin(client):
    """Harmless, once."""
    stream, _ = start(client, "sleep 0.1; exit 2")
    client.send(End(stream))
    assert client.finish(stream).reply["exit_code"] == 2
    stream, _ = start(client, "sleep 1000")
    client.send(End(stream), End(stream))
    assert client.closed_by_peer()
