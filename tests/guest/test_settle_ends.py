"""How a settle ends that takes its time: a disk that does not answer, a host that goes away, a thaw in between."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from agent.guest.build import compile_daemon
from agent.wire.messages import Cancel

pytestmark = [pytest.mark.host, pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root")]

LONG = {"timeout_ms": 20_000}
"""Half of it would be spent waiting for the disk."""


@pytest.fixture(scope="module")
def stuck_binary(tmp_path_factory):
    """The daemon on a machine whose disk never answers: its sync(2) does not come back."""
    directory = tmp_path_factory.mktemp("stuck")
    header = directory / "stuck.h"
    header.write_text("#include <unistd.h>\n#define sync() (void)pause()\n")
    compile_daemon(directory / "guest", compiler="musl-gcc", flags=("-static", "-O1", "-include", str(header)))
    return directory / "guest"


@pytest.fixture
def stuck(start_settling, stuck_binary):
    return start_settling(binary=stuck_binary)


@pytest.fixture
def guest(stuck):
    return stuck[0]


@pytest.fixture
def group(stuck):
    return stuck[1]


@pytest.fixture
def under_way(client, group, until):
    """The stream of a settle that has frozen everything and waits for the disk."""
    stream = client.open("settle", LONG)
    until(group.frozen, "all is frozen")
    return stream


def test_a_disk_that_does_not_answer_costs_the_time_out(client, group, guest, until):
    """The reply comes in time, all is frozen, nothing is stuck, and the next settle is no worse."""
    for _ in range(2):
        began = time.monotonic()
        reply = client.call("settle", {"timeout_ms": 400}).reply
        assert 0.35 < time.monotonic() - began < 8
        assert (reply["frozen"], reply["synced"]) == (True, False)
        assert reply["duration_ms"] >= 400
        assert group.frozen()
    assert client.call("thaw").reply == {}
    assert client.call("exec", {"cmd": "true"}).reply["exit_code"] == 0
    until(lambda: guest.children() == {}, "no workers are left")


def test_only_one_at_a_time(client, guest, group, under_way):
    """The second asker hears of the first, and changes nothing."""
    assert client.call("settle").fault == "conflict"
    assert guest.connect().call("settle").fault == "conflict"
    assert group.frozen()


def test_a_thaw_ends_it(client, guest, group, under_way):
    """Whoever wants the guest to go on wins."""
    assert guest.connect().call("thaw").reply == {}
    assert client.finish(under_way).fault == "cancelled"
    assert not group.frozen()
    assert client.call("info").reply["frozen"] is False


def test_a_configure_ends_it(client, group, under_way):
    """As a thaw does."""
    assert client.call("configure", {}).reply == {}
    assert client.finish(under_way).fault == "cancelled"
    assert not group.frozen()


def test_without_a_reply_nothing_stays_frozen(client, guest, group, until):
    """CANCEL, the opener's deadline, a lost connection."""
    stream = client.open("settle", LONG)
    until(group.frozen, "all is frozen")
    client.send(Cancel(stream))
    assert client.finish(stream).fault == "cancelled"
    assert not group.frozen()
    assert client.call("settle", LONG, timeout_ms=200).fault == "deadline_exceeded"
    assert not group.frozen()
    other = guest.connect()
    other.open("settle", LONG)
    until(group.frozen, "all is frozen")
    other.close()
    until(lambda: not group.frozen(), "the lost connection has thawed it")
    assert client.call("info").reply["frozen"] is False
    until(lambda: guest.children() == {}, "no workers are left")


def test_it_works_while_the_disk_holds_every_worker(client, group, guest):
    """320 operations that wait for the disk are the limit for users, and none for the host."""
    waiting = [client.open("sync") for _ in range(320)]
    assert client.call("sync").fault == "busy"
    assert client.call("settle", {"timeout_ms": 2000}).reply["frozen"] is True
    assert client.call("configure", {}).reply == {}
    assert not group.frozen()
    for stream in waiting:
        client.send(Cancel(stream))
        assert client.finish(stream).fault == "cancelled"


HELD = """
import ctypes, os, sys
fuse = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
assert ctypes.CDLL(None, use_errno=True).mount(b"held", sys.argv[1].encode(), b"fuse", 0, options) == 0
os.set_inheritable(fuse, True)
print("mounted", flush=True)
sys.stdin.read()
"""
"""A file system whose server never answers. Ends with its stdin: whoever waits in it is let go then."""


def test_what_waits_in_a_dead_file_system_cannot_be_frozen(start_settling, tmp_path, until):
    """The guest's own doing: settle says so in time, the rest stands still, and the thaw works."""
    if not Path("/dev/fuse").exists():
        pytest.skip("no FUSE on this machine")
    guest, group = start_settling()
    client = guest.connect()
    (tmp_path / "held").mkdir()
    script = {"cmd": "python3", "args": ["-c", HELD, str(tmp_path / "held")], "stdin": True}
    server = client.open("exec", script)
    client.notice(server)
    assert client.stream_frame(server).data == b"mounted\n"
    victim = client.call("exec", {"cmd": f"exec ls {tmp_path}/held/x", "background": True}).reply["pid"]
    until(lambda: "State:\tD" in Path(f"/proc/{victim}/status").read_text(), "it waits")
    began = time.monotonic()
    reply = client.call("settle", {"timeout_ms": 600}).reply
    assert time.monotonic() - began < 8
    assert reply["frozen"] is False
    assert not group.frozen()
    assert client.call("info").reply["frozen"] is True
    assert client.call("thaw").reply == {}
    client.send(Cancel(server))
    assert client.finish(server).fault == "cancelled"
    until(lambda: client.call("info").reply["processes"] == 0, "all have ended")
