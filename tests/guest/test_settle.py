"""settle and thaw: everything that exec starts stands still in between, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from agent.wire.messages import Cancel

pytestmark = [pytest.mark.host, pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root")]

COUNT = "while :; do echo >> {file}; done"
"""Grows a file as fast as it can."""
PATIENT = {"timeout_ms": 25_000}
"""For who wants to see many processes frozen, or the disk written to: on a busy machine that takes a while."""


@pytest.fixture
def guest(settling):
    return settling[0]


@pytest.fixture
def group(settling):
    return settling[1]


@pytest.fixture
def counter(client, tmp_path, until):
    """A background process that counts in a file; gives the file."""
    file = tmp_path / "count"
    client.call("exec", {"cmd": COUNT.format(file=file), "background": True, "tag": "counter"})
    until(file.exists, "it counts")
    return file


def stands_still(client, *files):
    """Whether files stay as they are while the daemon answers questions for a while."""
    before = [file.stat().st_size for file in files]
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        assert client.call("info").reply
    return [file.stat().st_size for file in files] == before


def work(pid):
    """All that a process has done so far: faults and time, of its own and of its children. What it takes of the memory
    is left out: the kernel may want some of that back meanwhile."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7:15]


def goes_on(until, file):
    before = file.stat().st_size
    until(lambda: file.stat().st_size > before, "it counts again")


def test_everything_stands_still_until_the_thaw(client, group, counter, tmp_path, until):
    """Background and foreground, children and those that left the process group; all go on afterwards."""
    other = tmp_path / "other"
    stream = client.open("exec", {"cmd": f"setsid sh -c '{COUNT.format(file=other)}' & wait"})
    client.notice(stream)
    until(other.exists, "the grandchild counts")
    goes_on(until, counter)
    os.sync()  # what others have written takes its time, and is not what is tested
    reply = client.call("settle", PATIENT).reply
    assert (reply["frozen"], reply["synced"]) == (True, True)
    assert 0 <= reply["duration_ms"] < 30_000
    assert group.frozen()
    assert stands_still(client, counter, other)
    assert client.call("thaw").reply == {}
    goes_on(until, counter)
    goes_on(until, other)


def test_fifty_busy_processes_and_a_spawner_freeze_in_time(client, group, until):
    """As many as the machine can run, one of them forking without pause: the bound holds, none is missed."""
    for _ in range(50):
        client.call("exec", {"cmd": "while :; do :; done", "background": True})
    client.call("exec", {"cmd": "while :; do (:) & (:) & wait; done", "background": True})
    until(lambda: len(group.pids()) > 50, "all run")
    began = time.monotonic()
    reply = client.call("settle", PATIENT).reply
    assert reply["frozen"] is True
    assert time.monotonic() - began < 27
    before = {pid: work(pid) for pid in group.pids()}
    assert stands_still(client)
    assert {pid: work(pid) for pid in group.pids()} == before
    assert client.call("thaw").reply == {}


def test_processes_are_in_the_group_from_the_start(client, guest, group):
    """Also what they start; the daemon and its workers are not."""
    shown = client.call("exec", {"cmd": "cat /proc/self/cgroup; (cat /proc/self/cgroup)"}).stdout.decode()
    assert [line for line in shown.splitlines() if line.startswith("0::")] == [f"0::/{group.path.name}/jobs"] * 2
    assert guest.pid not in group.pids()
    own = client.call("files.read", {"path": "/proc/self/cgroup"}).content.decode()
    assert group.path.name not in own


def test_the_daemon_works_while_all_else_stands_still(client, guest, group, counter, tmp_path):
    """Files, listings and new connections are its own work."""
    assert client.call("info").reply["frozen"] is False
    assert client.call("settle").reply["frozen"] is True
    path = str(tmp_path / "file")
    for connection in (client, guest.connect()):
        assert connection.upload({"path": path}, b"content" * 10000).reply["entry"]["size"] == 70000
        assert connection.call("files.read", {"path": path}).content == b"content" * 10000
        assert connection.call("files.remove", {"path": path}).reply == {}
        assert connection.call("sync").reply == {}
        assert [found["tag"] for found in connection.call("processes.list").reply["processes"]] == ["counter"]
        assert connection.call("info").reply["frozen"] is True
    assert group.frozen()


def test_an_exec_while_frozen_runs_after_the_thaw(client, group, counter, tmp_path, until):
    """Nothing of the user's runs before; it holds none of the daemon's descriptors meanwhile."""
    client.call("settle")
    marker = tmp_path / "marker"
    known = group.pids()
    streams = [
        client.open("exec", {"cmd": f"touch {marker}"}),
        client.open("exec", {"cmd": f"touch {marker}; sleep 1000", "background": True}),
    ]
    until(lambda: len(group.pids()) == len(known) + 2 and group.frozen(), "both stand in the group")
    for pid in group.pids() - known:
        assert len(list(Path(f"/proc/{pid}/fd").iterdir())) <= 5
    assert not marker.exists()
    assert client.call("info").reply["processes"] == 3
    client.call("thaw")
    assert client.finish(streams[0]).reply["exit_code"] == 0
    assert client.finish(streams[1]).reply["pid"] in group.pids()
    assert marker.exists()


def test_sigkill_reaches_the_frozen(client, group, counter, running, until, tmp_path):
    """Time-out, CANCEL and processes.signal end what stands still; a handler of another signal runs at the thaw."""
    trapped = tmp_path / "trapped"
    ready = tmp_path / "ready"
    trap = f"trap 'echo > {trapped}' USR1; echo > {ready}; while :; do sleep 0.01; done"
    client.call("exec", {"cmd": trap, "background": True, "tag": "trap"})
    until(ready.exists, "the handler is there")
    slow = client.open("exec", {"cmd": "sleep 1000", "timeout_ms": 500})
    given_up = client.open("exec", {"cmd": "sleep 1000"})
    pids = [client.notice(stream)["pid"] for stream in (slow, given_up)]
    client.call("settle")
    assert client.call("processes.signal", {"process": "trap", "signal": 10}).reply == {}
    assert client.call("processes.signal", {"process": "counter", "signal": 9}).reply == {}
    assert client.finish(slow).reply["timed_out"] is True
    client.send(Cancel(given_up))
    assert client.finish(given_up).fault == "cancelled"
    until(lambda: not any(map(running, pids)), "both are dead")
    until(lambda: client.call("info").reply["processes"] == 1, "they are reaped")
    assert [found["tag"] for found in client.call("processes.list").reply["processes"]] == ["trap"]
    assert client.call("info").reply["frozen"] is True
    assert not trapped.exists()
    client.call("thaw")
    until(trapped.exists, "the handler has run")


def test_a_frozen_exec_keeps_its_time_out(client, group):
    """It is killed without ever having run."""
    client.call("settle")
    outcome = client.call("exec", {"cmd": "true", "timeout_ms": 200})
    assert (outcome.reply["exit_code"], outcome.reply["timed_out"]) == (137, True)


def test_twice_and_unasked(client, group, counter, until):
    """A second settle is the same again; a thaw that nobody needs does nothing."""
    assert client.call("thaw").reply == {}
    goes_on(until, counter)
    assert client.call("settle").reply["frozen"] is True
    assert client.call("settle").reply["frozen"] is True
    assert group.frozen()
    assert client.call("thaw").reply == {}
    assert client.call("thaw").reply == {}
    goes_on(until, counter)


def test_the_forgotten_thaws_by_itself(client, group, counter, until):
    """After the time that settle was given; a second settle counts anew."""
    client.call("settle", {"thaw_after_ms": 200})
    began = time.monotonic()
    client.call("settle", {"thaw_after_ms": 1500})
    until(lambda: not group.frozen(), "it thaws")
    assert time.monotonic() - began > 1.0
    goes_on(until, counter)
    assert client.call("info").reply["frozen"] is False


@pytest.mark.parametrize(
    "body",
    [{"timeout_ms": 0}, {"timeout_ms": 60001}, {"timeout_ms": "1"}, {"thaw_after_ms": 0}, {"thaw_after_ms": 1.5}],
)
def test_wrong_values_freeze_nothing(client, group, counter, until, body):
    """Refused before anything is done."""
    assert client.call("settle", body).fault == "invalid_argument"
    goes_on(until, counter)


def test_without_control_groups(start_guest):
    """The guest goes on as before, and says so."""
    client = start_guest().connect()
    os.sync()
    reply = client.call("settle", PATIENT).reply
    assert (reply["frozen"], reply["synced"]) == (False, True)
    assert client.call("exec", {"cmd": "true"}).reply["exit_code"] == 0
    assert client.call("info").reply["frozen"] is False
    assert client.call("thaw").reply == {}


def test_the_group_is_gone(client, group):
    """Root in the guest removed it: programs run on as before, only nothing can be frozen."""
    (group.path / "jobs").rmdir()
    assert client.call("exec", {"cmd": "cat /proc/self/cgroup"}).stdout.decode().count(f"/{group.path.name}/jobs") == 1
    (group.path / "jobs").rmdir()
    group.path.rmdir()
    assert client.call("exec", {"cmd": "true"}).reply["exit_code"] == 0
    assert client.call("settle").reply["frozen"] is False
    assert client.call("exec", {"cmd": "true"}).reply["exit_code"] == 0
    assert client.call("thaw").reply == {}


def test_the_group_is_unusable(client, group):
    """A threaded group beside it makes every other one invalid for processes: they run outside."""
    (group.path / "threads").mkdir()
    (group.path / "threads" / "cgroup.type").write_text("threaded")
    shown = client.call("exec", {"cmd": "cat /proc/self/cgroup"})
    assert shown.reply["exit_code"] == 0
    assert group.path.name not in shown.stdout.decode()
    os.sync()
    assert client.call("settle", PATIENT).reply["synced"] is True
    assert client.call("exec", {"cmd": "true"}).fault == "invalid_state"
    assert client.call("thaw").reply == {}
    assert client.call("exec", {"cmd": "true"}).reply["exit_code"] == 0
