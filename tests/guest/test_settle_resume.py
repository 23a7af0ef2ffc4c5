"""A guest that goes on somewhere else: the connections of before are dead without a word, their processes with them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import stat
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.host, pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root")]

COUNT = "while :; do echo >> {file}; sleep 0.01; done"
SYS_PIDFD_GETFD = 438


@pytest.fixture
def guest(settling):
    return settling[0]


@pytest.fixture
def group(settling):
    return settling[1]


@pytest.fixture
def jobs(client, tmp_path, until):
    """Two that count: one in the foreground, one in the background. (stream, foreground pid, files)"""
    files = {name: tmp_path / name for name in ("foreground", "background")}
    stream = client.open("exec", {"cmd": COUNT.format(file=files["foreground"])})
    pid = client.notice(stream)["pid"]
    client.call("exec", {"cmd": COUNT.format(file=files["background"]), "background": True, "tag": "background"})
    until(lambda: files["foreground"].exists() and files["background"].exists(), "both count")
    return stream, pid, files


def goes_on(until, file):
    before = file.stat().st_size
    until(lambda: file.stat().st_size > before, "it counts")


def test_the_new_host_ends_what_the_old_one_left(client, guest, group, jobs, running, until):
    """Foreground processes are killed without having run again, the old connections closed; the background goes on."""
    _, pid, files = jobs
    bystander = guest.connect()
    assert client.call("settle").reply["frozen"] is True
    counted = files["foreground"].stat().st_size
    new = guest.connect()
    later = new.open("exec", {"cmd": "echo hello"})
    assert new.call("configure", {"entropy": bytes(64), "machine_id": "a" * 32}).reply == {}
    until(lambda: not running(pid), "it was killed")
    assert files["foreground"].stat().st_size == counted
    assert client.closed_by_peer()
    assert bystander.closed_by_peer()
    goes_on(until, files["background"])
    assert new.finish(later).stdout == b"hello\n"
    until(lambda: new.call("info").reply["processes"] == 1, "the others are reaped")
    assert [found["tag"] for found in new.call("processes.list").reply["processes"]] == ["background"]
    assert guest.connect().call("settle").reply["frozen"] is True


def wrote(pid, log):
    """The bytes a process has written until now; also into `log`."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    log.append(next(line for line in lines if line.startswith("wchar")))
    return log[-1]


def test_a_connection_that_nobody_reads_ends_too(guest, group, until, running):
    """Its output is stuck in the kernel, and so it stays open as long as nobody gives it up."""
    stuck = guest.connect(initial_credit=16 << 20)
    stream = stuck.open("exec", {"cmd": "cat /dev/zero"})
    pid = stuck.notice(stream)["pid"]
    host = guest.connect()
    written = []
    until(lambda: written[-20:] == 20 * [wrote(pid, written)], "it waits for its reader")
    host.call("settle")
    assert connections(guest) == 2
    assert guest.connect().call("configure", {}).reply == {}
    until(lambda: not running(pid), "it was killed")
    until(lambda: connections(guest) == 1, "only the new one is open")


def test_the_same_host_goes_on(client, guest, group, jobs, until):
    """configure on a connection of before: that one stays, and what belongs to it."""
    _, _, files = jobs
    client.call("settle")
    assert client.call("configure", {}).reply == {}
    assert not group.frozen()
    goes_on(until, files["foreground"])
    goes_on(until, files["background"])


def test_a_thaw_ends_nothing(client, guest, jobs, until):
    """A pause that failed: everything is as before, and later configures end nothing either."""
    _, _, files = jobs
    new = guest.connect()
    client.call("settle")
    new.call("thaw")
    goes_on(until, files["foreground"])
    assert guest.connect().call("configure", {}).reply == {}
    goes_on(until, files["foreground"])
    assert client.call("info").reply


def test_a_configure_that_fails_thaws_nothing(client, guest, group, jobs):
    """Who the guest is, it does not know yet: its processes wait for a better one."""
    client.call("settle")
    new = guest.connect()
    assert new.call("configure", {"machine_id": "A" * 32}).fault == "invalid_argument"
    assert group.frozen()
    assert client.call("info").reply["frozen"] is True


@contextmanager
def sockets(guest):
    """The daemon's accepted connections, for a moment ours too."""
    library = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(guest.pid)
    with ExitStack() as stack:
        stack.callback(os.close, pidfd)
        found = []
        for name in Path(f"/proc/{guest.pid}/fd").iterdir():
            descriptor = library.syscall(SYS_PIDFD_GETFD, pidfd, int(name.name), 0)
            if descriptor >= 0 and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                copy = stack.enter_context(socket.socket(fileno=descriptor))
                if copy.family == socket.AF_INET and not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found.append(copy)
            elif descriptor >= 0:
                os.close(descriptor)
        yield found


def connections(guest):
    with sockets(guest) as found:
        return len(found)


KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}


def test_silent_peers_have_30_seconds(client, guest):
    """Every connection: first probe after 15 s, three of them 5 s apart, and 30 s for data that nobody takes."""
    client.call("info")
    with sockets(guest) as (connection,):
        options = {name: connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in KEEPALIVE}
        assert options == KEEPALIVE
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


class Isolated:
    """Enters a process's network namespace for the time of a connect."""

    def __init__(self, pid):
        self.theirs = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        self.ours = os.open("/proc/self/ns/net", os.O_RDONLY)

    def __enter__(self):
        assert ctypes.CDLL(None).setns(self.theirs, 0) == 0

    def __exit__(self, *_):
        assert ctypes.CDLL(None).setns(self.ours, 0) == 0
        os.close(self.theirs)
        os.close(self.ours)


@pytest.mark.parametrize("busy", [False, True], ids=["quiet", "with output on its way"])
def test_a_host_that_vanishes_is_noticed(start_settling, until, running, tmp_path, busy):
    """No packet comes back, as after a resume elsewhere: dropped by keep-alive or for what it never acknowledges."""
    prefix = ("-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    guest, _ = start_settling(prefix=prefix)
    with Isolated(guest.pid):
        client = guest.connect()
    command = "while :; do echo line; sleep 0.05; done" if busy else "sleep 1000"
    stream = client.open("exec", {"cmd": command})
    pid = client.notice(stream)["pid"]
    file = tmp_path / "count"
    client.call("exec", {"cmd": COUNT.format(file=file), "background": True})
    with sockets(guest) as (connection,):  # the same mechanism in a tenth of the time
        for name, value in {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 3000}.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    subprocess.run(["nsenter", "-t", str(guest.pid), "-n", "ip", "link", "set", "lo", "down"], check=True)
    began = time.monotonic()
    until(lambda: not running(pid), "its foreground process was killed")
    assert time.monotonic() - began < 25
    until(lambda: connections(guest) == 0, "the connection was closed")
    goes_on(until, file)


def test_a_stopped_process_of_the_user_is_no_obstacle(client, group, tmp_path):
    """SIGSTOP and the freezer do not know of each other."""
    pid = client.call("exec", {"cmd": "sleep 1000", "background": True}).reply["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert client.call("settle").reply["frozen"] is True
    os.kill(pid, signal.SIGCONT)
    assert client.call("thaw").reply == {}
    assert client.call("processes.signal", {"process": pid, "signal": 9}).reply == {}
