"""VMMs that their guests have taken over and that look like something else: found by what they cannot change."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from agent.vmm.cgroup import CgroupTree
from agent.vmm.driver import VmWillNotDie
from agent.vmm.process import ENVIRONMENT, WatchedProcess, processes_of, read_identity, read_stat, spawn, users_of
from agent.vmm.qemu import QemuDriver
from agent.vmm.qemu_command import Accelerator
from agent.vmm.qemu_launch import Launcher

pytestmark = pytest.mark.host

USER = 64_322
LIMITS = {"memory_bytes": 1 << 30, "processes": 16}

WITHOUT_ITS_FIRST_THREAD = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=[60]).start()
ctypes.CDLL(None).syscall(60, 0)
"""
"""The process lives, and its entry in /proc says that it is a zombie, without a program and a directory."""

PYTHON = shutil.which("python3", path=ENVIRONMENT["PATH"])
"""One that every user can run; the tests' own may lie where only root can go."""

DISGUISES = {"elsewhere": ["sleep", "60"], "zombie": [PYTHON, "-c", WITHOUT_ITS_FIRST_THREAD]}


@pytest.fixture
def cgroups():
    tree = CgroupTree.detect(f"capsule-test-{os.getpid()}")
    yield tree
    tree.remove("one")
    if tree._parent is not None and tree._parent.exists():
        tree._parent.rmdir()


@pytest.fixture
def driver(cgroups):
    return QemuDriver(
        Launcher(binary=Path("/nonexistent"), accelerator=Accelerator("tcg")), version="0", cgroups=cgroups
    )


@pytest.fixture(params=DISGUISES)
def hidden(request, cgroups):
    """A process of a VM's user that does not look like a VM at all."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with Path(os.devnull).open("w") as output:
        watched = spawn(
            DISGUISES[request.param],
            directory=Path("/"),
            uid=USER,
            gid=USER,
            groups=(),
            output=output.fileno(),
            descriptors=(),
        )
    cgroups.add("one", watched.identity.pid, **LIMITS)
    deadline = time.monotonic() + 60
    while request.param == "zombie" and read_stat(watched.identity.pid).state != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not watched.has_exited()
    yield watched
    watched.kill()
    deadline = time.monotonic() + 60
    while not watched.has_exited():  # the next test looks for processes of this user
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_a_process_is_killed_whatever_it_looks_like(driver, hidden):
    """Its identity decides."""
    await driver.kill_process(hidden.identity)
    assert hidden.has_exited()


@pytest.fixture
def of_root():
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


async def test_what_runs_as_root_is_left_alone(driver, of_root):
    """A VM never does: the note of its identity must be of another time."""
    with pytest.raises(VmWillNotDie, match="runs as root"):
        await driver.kill_process(read_identity(of_root.pid))
    assert of_root.poll() is None


async def test_processes_of_a_user_are_ended(driver, cgroups, hidden):
    """Found by their user, told to be ours by their control group; others are left alone, but said."""
    assert (USER, hidden.identity) in processes_of({USER})
    assert await driver.end_users({USER}, {"another"}) == {USER}
    assert await driver.end_users({USER + 1}, {"one"}) == set()
    assert not hidden.has_exited()
    if cgroups.group_of(hidden.identity.pid) is None:
        pytest.skip("no version 2 control groups here")
    assert await driver.end_users({USER}, {"one"}) == set()
    assert hidden.has_exited()


async def test_what_has_ended_is_no_process_of_a_user(hidden):
    """Also before it is reaped."""
    hidden.kill()
    await hidden.wait()
    assert users_of(hidden.identity.pid) == frozenset()
    assert WatchedProcess.open(hidden.identity) is None
    assert list(processes_of({USER})) == []
