"""Background processes, their list, and signals."""

from __future__ import annotations

import os
import time

import pytest

from agent.wire.messages import Cancel, End

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="exec as root is the default, which needs root")


def listed(client):
    return {entry["pid"]: entry for entry in client.call("processes.list").reply["processes"]}


def test_a_background_process_outlives_its_connection(guest, client, running):
    """The reply comes at once; nobody owns it."""
    reply = client.call("exec", {"cmd": "sleep 1000", "background": True, "tag": "nap"}).reply
    assert reply == {"pid": reply["pid"], "tag": "nap"}
    client.close()
    other = guest.connect()
    assert reply["pid"] in listed(other)
    assert running(reply["pid"])


def test_a_background_process_never_blocks_on_its_output(client, until, tmp_path):
    """Far more than any pipe holds, and nobody reads."""
    done = tmp_path / "done"
    body = {"cmd": f"head -c 4000000 /dev/zero; head -c 4000000 /dev/zero >&2; touch {done}", "background": True}
    assert client.call("exec", body).reply
    until(done.exists, "it has printed everything")
    until(lambda: listed(client) == {}, "it has ended")


def test_a_grandchild_of_the_background_never_blocks_either(client, until, running, tmp_path):
    """A server that puts itself into the background keeps printing after its parent has gone."""
    done = tmp_path / "done"
    body = {"cmd": f"(sleep 0.3; head -c 4000000 /dev/zero; touch {done}) &", "background": True}
    pid = client.call("exec", body).reply["pid"]
    until(lambda: not running(pid), "the shell has ended")
    until(done.exists, "the grandchild has printed everything")


def test_unknown_user_in_the_background(client):
    """Told before anything is started."""
    body = {"cmd": "true", "background": True, "user": "nosuchuser"}
    assert client.call("exec", body).fault == "not_found"


def test_a_background_process_has_no_time_out(client, running):
    """`timeout_ms` is for who waits."""
    pid = client.call("exec", {"cmd": "sleep 1000", "background": True, "timeout_ms": 1}).reply["pid"]
    time.sleep(0.1)  # what is proved is that nothing happens
    assert running(pid)


def test_the_list(client, tmp_path):
    """Everything that runs, as it was asked for."""
    before = time.time_ns()
    argv = client.open("exec", {"cmd": "sleep", "args": ["1000"], "user": "nobody", "cwd": "/usr", "tag": "argv"})
    pid = client.notice(argv)["pid"]
    shell = client.call("exec", {"cmd": "sleep 1000", "background": True, "cwd": str(tmp_path)}).reply["pid"]
    processes = listed(client)
    assert before <= processes[pid].pop("started_ns") <= time.time_ns()
    del processes[shell]["started_ns"]
    assert processes == {
        pid: {
            "pid": pid,
            "tag": "argv",
            "cmd": "sleep",
            "args": ["1000"],
            "user": "nobody",
            "cwd": "/usr",
            "background": False,
        },
        shell: {"pid": shell, "cmd": "sleep 1000", "user": "root", "cwd": str(tmp_path), "background": True},
    }
    assert client.call("info").reply["processes"] == 2


def test_the_list_is_bounded(client):
    """Long command lines are cut, in characters: a full table fits into one reply."""
    long = ["é" * 3000] * 40
    stream = client.open("exec", {"cmd": "sleep 60 # " + "ü" * 9000, "args": None} | {"args": long})
    assert client.finish(stream).reply["exit_code"] == 126
    for i in range(40):
        client.call("exec", {"cmd": f"sleep 60 # {i} " + "ü" * 9000, "background": True})
    entries = client.call("processes.list").reply["processes"]
    assert len(entries) == 40
    assert all(len(entry["cmd"].encode()) <= 2050 for entry in entries)


def test_a_tag_is_unique_among_the_living(client, until):
    """Conflict while it runs; free afterwards."""
    first = client.open("exec", {"cmd": "read x", "stdin": True, "tag": "t"})
    client.notice(first)
    assert client.call("exec", {"cmd": "true", "tag": "t", "background": True}).fault == "conflict"
    client.send(End(first))
    client.finish(first)
    until(lambda: client.call("exec", {"cmd": "true", "tag": "t"}).reply, "the tag is free")


@pytest.mark.parametrize("by_tag", [False, True])
def test_signals_reach_the_whole_group(client, by_tag):
    """By pid or tag; as a terminal would send it."""
    body = {"cmd": "trap 'echo caught; exit 5' TERM; echo ready; sleep 1000 & wait", "tag": "target"}
    stream = client.open("exec", body)
    pid = client.notice(stream)["pid"]
    assert client.stream_frame(stream).data == b"ready\n"  # a signal before the trap would kill the shell
    signal = {"process": "target" if by_tag else pid, "signal": 15}
    assert client.call("processes.signal", signal).reply == {}
    outcome = client.finish(stream)
    assert outcome.stdout == b"caught\n"
    assert outcome.reply["exit_code"] == 5


def test_kill(client):
    """SIGKILL shows in the exec's own reply."""
    stream = client.open("exec", {"cmd": "sleep 1000"})
    pid = client.notice(stream)["pid"]
    client.call("processes.signal", {"process": pid, "signal": 9})
    reply = client.finish(stream).reply
    assert (reply["exit_code"], reply["signal"], reply["timed_out"]) == (137, 9, False)


def test_only_our_processes_can_be_signalled(client, guest):
    """Neither the daemon nor any other pid; not one that has ended."""
    stream = client.open("exec", {"cmd": "true"})
    ended = client.notice(stream)["pid"]
    client.finish(stream)
    for process in (1, guest.pid, os.getpid(), ended, "nosuchtag", ""):
        assert client.call("processes.signal", {"process": process, "signal": 15}).fault == "not_found"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"process": 5},
        {"signal": 5},
        {"process": 1, "signal": 0},
        {"process": 1, "signal": 65},
        {"process": -1, "signal": 9},
        {"process": 0, "signal": 9},
        {"process": 2**40, "signal": 9},
        {"process": 1.5, "signal": 9},
        {"process": [1], "signal": 9},
    ],
)
def test_wrong_signals(client, body):
    """Above all: never pid 0 or -1, which would be everybody."""
    assert client.call("processes.signal", body).fault == "invalid_argument"


def test_background_has_its_own_limit(client):
    """256, beside the foreground's."""
    for _ in range(256):
        assert client.call("exec", {"cmd": "sleep 1000", "background": True}).reply
    assert client.call("exec", {"cmd": "true", "background": True}).fault == "too_many_processes"
    assert client.call("exec", {"cmd": "true"}).reply["exit_code"] == 0


def test_cancel_of_a_background_exec_is_too_late(client, running):
    """Its stream was over with the reply."""
    stream = client.open("exec", {"cmd": "sleep 1000", "background": True})
    pid = client.finish(stream).reply["pid"]
    client.send(Cancel(stream))
    assert pid in listed(client)
    assert running(pid)
