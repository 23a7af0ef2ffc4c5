"""How an exec ends: by itself, by time-out, by CANCEL, with its connection; and what is left of it: nothing."""

from __future__ import annotations

import os
import time

import pytest

from agent.wire.messages import Cancel, Credit, Data, End, Failure, Open

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="exec as root is the default, which needs root")

FAMILY = "sleep 1000 & echo $! $$; wait"
"""A process group of two; prints both pids."""


def family(client, body=None):
    """Start FAMILY; its stream and pids."""
    stream = client.open("exec", {"cmd": FAMILY, **(body or {})})
    client.notice(stream)
    frame = client.stream_frame(stream)
    assert isinstance(frame, Data)
    pids = [int(pid) for pid in frame.data.split()]
    client.send(Credit(stream, len(frame.data)))
    return stream, pids


def test_a_signal_shows_in_the_exit_code(client):
    """128 + signal, and the signal itself."""
    outcome = client.call("exec", {"cmd": "kill -SEGV $$"})
    assert (outcome.reply["exit_code"], outcome.reply["signal"]) == (139, 11)
    assert outcome.reply["timed_out"] is False


ALLOWED = (1000, 5000, 25_000)
"""Milliseconds for FAMILY to print in: the first of them that is enough on this machine, as busy as it is."""


def test_time_out_kills_the_group_and_keeps_the_output(client, running, until):
    """The REPLY says so, after the output so far."""
    for allowed in ALLOWED:
        outcome = client.call("exec", {"cmd": FAMILY, "timeout_ms": allowed})
        assert outcome.reply["timed_out"] is True
        assert outcome.reply["exit_code"] == 137
        assert outcome.reply["duration_ms"] >= allowed
        if outcome.stdout:
            break
    pids = [int(pid) for pid in outcome.stdout.split()]
    assert len(pids) == 2
    until(lambda: not any(map(running, pids)), "the group is dead")


def test_a_process_that_ends_in_time_is_not_timed_out(client):
    """The timer is the process's, not the stream's."""
    assert client.call("exec", {"cmd": "exit 3", "timeout_ms": 5000}).reply["exit_code"] == 3


def test_cancel_kills_the_group(client, running, until):
    """FAULT cancelled comes at once, the group is gone, the connection lives."""
    stream, pids = family(client)
    client.send(Cancel(stream))
    assert client.finish(stream).fault == "cancelled"
    until(lambda: not any(map(running, pids)), "the group is dead")
    until(lambda: client.call("info").reply["processes"] == 0, "it is reaped")


def test_the_openers_deadline_kills_the_group(client, running, until):
    """OPEN's timeout_ms: the work is stopped, the answer is a FAULT."""
    for allowed in ALLOWED:
        outcome = client.call("exec", {"cmd": FAMILY}, timeout_ms=allowed)
        assert outcome.fault == "deadline_exceeded"
        if outcome.stdout:
            break
    pids = [int(pid) for pid in outcome.stdout.split()]
    assert len(pids) == 2
    until(lambda: not any(map(running, pids)), "the group is dead")


def test_a_lost_connection_kills_what_it_owned(guest, running, until):
    """Every foreground group of the connection; other connections notice nothing."""
    doomed, other = guest.connect(), guest.connect()
    lost = [pid for _ in range(3) for pid in family(doomed)[1]]
    stream, kept = family(other)
    doomed.close()
    until(lambda: not any(map(running, lost)), "the groups are dead")
    assert all(map(running, kept))
    other.send(Cancel(stream))
    assert other.finish(stream).fault == "cancelled"


def test_a_half_closed_connection_is_lost(guest, running, until):
    """An opener that can no longer grant or cancel owns nothing."""
    client = guest.connect()
    _, pids = family(client)
    client.sock.shutdown(1)
    until(lambda: not any(map(running, pids)), "the group is dead")


def test_a_lost_connection_is_noticed_while_output_is_stalled(guest, running, until):
    """Also when nothing is read from it, because its output buffer is full."""
    client = guest.connect()
    stream = client.open("exec", {"cmd": "echo $$; exec yes"})
    client.notice(stream)
    pid = int(client.stream_frame(stream).data.split(b"\n")[0])
    client.send(*[Credit(stream, 4 << 20)] * 3)
    until(lambda: b"pipe" in wchan(pid), "yes is blocked")
    client.close()
    until(lambda: not running(pid), "yes is dead")


def wchan(pid):
    with open(f"/proc/{pid}/wchan", "rb") as file:  # noqa: PTH123
        return file.read()


def test_a_grandchild_that_holds_the_pipes_delays_nothing(client, running):
    """The exec ends with its direct child; what was printed by then is delivered; the grandchild lives on."""
    start = time.monotonic()
    outcome = client.call("exec", {"cmd": "sleep 1000 & echo $!"})
    assert time.monotonic() - start < 20
    pid = int(outcome.stdout)
    assert outcome.reply["exit_code"] == 0
    assert running(pid)
    os.kill(pid, 9)


def test_a_grandchild_that_floods_delays_nothing(client, tmp_path):
    """After the grace only what is in the pipe then is delivered."""
    flowing = tmp_path / "flowing"
    flood = f"(head -c 100000 /dev/zero; touch {flowing}; exec yes) &"
    outcome = client.call("exec", {"cmd": f"{flood} while [ ! -e {flowing} ]; do sleep 0.01; done"})
    assert outcome.reply["exit_code"] == 0
    assert len(outcome.stdout) >= 100_000


def test_output_shortly_after_the_exit_still_counts(client):
    """The grace: a grandchild that was just about to print. On a busy machine it may not come to it in time."""
    command = {"cmd": "(sleep 0.02; echo late) &"}
    assert any(client.call("exec", command).stdout == b"late\n" for _ in range(20))


def test_all_output_comes_before_the_reply_even_when_read_late(guest):
    """The process is long gone when the reader grants credit; nothing is lost."""
    client = guest.connect(initial_credit=1000)
    stream = client.open("exec", {"cmd": "head -c 60000 /dev/zero"})
    client.notice(stream)
    assert isinstance(client.stream_frame(stream), Data)
    time.sleep(0.3)  # past the exit grace: what is proved is that time does not matter
    client.send(Credit(stream, 100_000))
    outcome = client.finish(stream)
    assert 59_000 <= len(outcome.stdout) < 60_000
    assert outcome.reply["exit_code"] == 0


def test_orphans_are_reaped(guest, client, until):
    """Whatever ends up with PID 1 leaves no zombie."""
    client.call("exec", {"cmd": "for i in 1 2 3 4 5 6 7 8; do (setsid sh -c 'sleep 0.05' &) ; done"})
    until(lambda: guest.children() == {}, "no children and no zombies")


def test_frames_that_crossed_the_reply_are_ignored(client):
    """Rule 5: DATA, END, CREDIT and CANCEL for a retired stream."""
    stream = client.open("exec", {"cmd": "true"})
    client.finish(stream)
    client.send(Data(stream, 0, b"late"), End(stream), Credit(stream, 5), Cancel(stream))
    assert client.call("info").reply is not None


def test_too_many_processes(client):
    """The 257th foreground process is refused and works again once one has ended."""
    streams = [client.open("exec", {"cmd": "read x", "stdin": True}) for _ in range(256)]
    for stream in streams:
        client.notice(stream)
    assert client.call("exec", {"cmd": "true"}).fault == "too_many_processes"
    assert client.call("files.stat", {"path": "/"}).reply is not None
    client.send(End(streams[0]))
    client.finish(streams[0])
    assert client.call("exec", {"cmd": "true"}).reply["exit_code"] == 0
    client.send(*[Cancel(stream) for stream in streams[1:]])


def test_nothing_leaks(guest, client, until):
    """After a hundred execs of every ending the daemon has no more descriptors and children than before."""
    client.call("exec", {"cmd": "true"})
    before = guest.descriptors()
    for _ in range(25):
        client.call("exec", {"cmd": "true"})
        client.call("exec", {"cmd": "true", "user": "nosuchuser"})
        client.call("exec", {"cmd": "sleep 9", "timeout_ms": 1})
        stream = client.open("exec", {"cmd": "sleep 9"})
        client.send(Cancel(stream))
        assert isinstance(client.stream_frame(stream), Data | Failure)
    until(lambda: guest.children() == {}, "no children")
    until(lambda: guest.descriptors() <= before, "no descriptors")


def test_stopping_the_daemon_kills_everything(start_guest, running, until):
    """SIGTERM: as a machine that goes down."""
    guest = start_guest()
    _, pids = family(guest.connect())
    guest.process.terminate()
    until(lambda: not any(map(running, pids)), "the group is dead")
    assert guest.process.wait(timeout=30) == 0
    guest.ended = True


def test_an_open_may_follow_at_once(guest):
    """OPENs in one segment with HELLO are served."""
    client = guest.connect()
    client.send(*[Open(i, "exec", {"cmd": "true"}, 0) for i in range(1, 11)])
    assert all(client.finish(i).reply["exit_code"] == 0 for i in range(1, 11))
