"""Processes by pidfd and identity, with harmless programs."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from agent.vmm.driver import VmProcess
from agent.vmm.process import ProcessExit, WatchedProcess, inspect, processes, read_identity, read_stat


def pidfds():
    """The links of what we have open, by number."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[entry.name] = str(entry.readlink())
    return found


@pytest.fixture
def sleeper():
    """A child, as subprocess leaves it: its returncode is ours to find out."""
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.returncode = 0  # reaped by the test through its pidfd
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child.pid, 0)


@contextlib.contextmanager
def waiting_child(command):
    """A child that executes a command when its standard input is closed."""
    child = subprocess.Popen(["sh", "-c", 'read line; exec "$@"', "sh", *command], stdin=subprocess.PIPE)
    yield child
    child.returncode = 0  # reaped by the test


@pytest.mark.parametrize(
    ("command", "expected"),
    [(["true"], "exited with status 0"), (["sh", "-c", "exit 3"], "exited with status 3")],
)
async def test_an_exit_status_is_reported(command, expected):
    """Of a child the status is known."""
    with waiting_child(command) as child:
        watched = WatchedProcess.open(read_identity(child.pid))
        child.stdin.close()
        assert str(await watched.wait()) == expected


async def test_a_kill_is_reported_and_the_child_reaped(sleeper):
    """Killed through the pidfd: the signal is known, there is no zombie, and killing again is harmless."""
    watched = WatchedProcess.open(read_identity(sleeper.pid))
    watched.kill()
    assert await watched.wait() == ProcessExit(signal=signal.SIGKILL)
    assert read_stat(sleeper.pid) is None
    watched.kill()
    assert watched.has_exited()
    assert str(await watched.wait()) == "was killed by SIGKILL"


def test_another_start_time_is_another_process(sleeper):
    """A pid that was used again is not taken for the process that had it."""
    identity = read_identity(sleeper.pid)
    assert WatchedProcess.open(replace(identity, start_time=identity.start_time - 1)) is None
    assert WatchedProcess.open(VmProcess(2**22 + 5, 1)) is None
    assert read_stat(sleeper.pid).state in "RSD"


def test_a_zombie_is_not_a_running_process(sleeper):
    """Dead and not yet reaped: neither adopted nor listed; opening it reaps it."""
    identity = read_identity(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert inspect(sleeper.pid) is None
    assert WatchedProcess.open(identity) is None
    assert read_stat(sleeper.pid) is None


async def test_descriptors_are_given_back(sleeper):
    """Neither waiting nor being dropped leaks one."""
    gc.collect()  # what tests before this one have left
    before = pidfds()
    for _ in range(5):
        watched = WatchedProcess.open(read_identity(sleeper.pid))
        with trio.move_on_after(0.01):
            await watched.wait()
        del watched
    await trio.lowlevel.checkpoint()  # trio holds on to the last Cancelled, and that to its traceback
    gc.collect()
    assert pidfds() == before


def test_a_programs_name_cannot_forge_its_entry(tmp_path):
    """The name stands in parentheses in /proc/PID/stat; a program may call itself `x) Z 1 (`."""
    program = tmp_path / "x) Z 1 ("
    shutil.copy(shutil.which("sleep"), program)
    with subprocess.Popen([program, "60"]) as child:
        stat = read_stat(child.pid)
        assert stat.state in "RSD"
        assert stat.start_time > 0
        child.kill()


def test_the_process_table_is_read(sleeper):
    """Program, directory and arguments as they are."""
    (found,) = [candidate for candidate in processes() if candidate.identity.pid == sleeper.pid]
    assert found.program in {"sleep", "coreutils", "busybox"}
    assert found.arguments[:2] == ("sleep", "60")
    assert found.directory == Path.cwd()
