"""The real thing: QEMU, a kernel and guests that misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from agent.vmm import qemu_vm
from agent.vmm.driver import MAX_CONSOLE_BYTES, VmProcess, VmStartFailed
from agent.vmm.process import inspect
from agent.vmm.qemu_vm import QemuVm

pytestmark = [pytest.mark.vm, pytest.mark.host]


async def console_has(vm, text):
    """Wait until the guest has written a text, and return all it has written."""
    for _ in range(900):
        if text in (console := await vm.console_tail()):
            return console
        if vm.statistics() is None:
            raise AssertionError(f"{await vm.wait_exit()}, and no {text!r} in {console!r}")
        await trio.sleep(0.1)
    raise AssertionError(f"no {text!r} in {console!r}; {vm.statistics()}")


def descriptors(process):
    """What a process has open. It opens and closes meanwhile: what is gone again is left out."""
    found = set()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(str(entry.readlink()))
    return found


def status(process):
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("poweroff", "the guest powered off"),
        ("restart", "the guest restarted or its kernel panicked"),
        ("panic", "the guest's kernel panicked: Kernel panic - not syncing: Attempted to kill init!"),
    ],
)
async def test_the_guests_own_end_is_noticed_and_explained(qemu, mode, reason):
    """Power off, restart, panic: the VM is over, QEMU is gone, and the console that says why is still there."""
    vm = await qemu.driver.boot(qemu.spec(mode=mode))
    assert (await vm.wait_exit()).startswith(reason)
    assert qemu.driver.find_orphans(qemu.root) == {}
    assert f"init runs: {mode}" in await vm.console_tail()


async def test_the_guests_end_is_noticed_when_the_first_waiter_has_gone(qemu):
    """One waiter at a time talks to QEMU; when it is cancelled, another must."""
    vm = await qemu.driver.boot(qemu.spec(mode="poweroff"))
    first = trio.CancelScope()

    async def give_up():
        with first:
            await vm.wait_exit()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(vm.wait_exit)
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
    assert (await vm.wait_exit()).startswith("the guest powered off")


async def test_an_end_that_no_agent_saw_is_noticed_on_adoption(qemu):
    """The guest powered off while the agent was away: QEMU waits, and the next agent learns of it at once."""
    spec = qemu.spec(mode="poweroff")
    vm = await qemu.driver.boot(spec)
    await console_has(vm, "Power down")
    adopted = await qemu.driver.adopt(spec, vm.process)
    assert (await adopted.wait_exit()).startswith("the guest")
    assert qemu.driver.find_orphans(qemu.root) == {}


async def test_a_crash_is_explained_by_its_signal(qemu):
    """QEMU killed from outside: said so."""
    vm = await qemu.driver.boot(qemu.spec())
    os.kill(vm.process.pid, signal.SIGSEGV)
    assert await vm.wait_exit() == "QEMU was killed by SIGSEGV"


@pytest.fixture
async def orphan(qemu, accelerator):
    """A VM (spec, process) whose agent has been killed with SIGKILL."""
    spec = qemu.spec()
    parent = qemu.cgroups._parent.name if qemu.cgroups._parent else "none"
    agent = await trio.run_process(
        [sys.executable, Path(__file__).with_name("agent_that_dies.py")],
        stdin=msgspec.json.encode((spec, accelerator, parent), enc_hook=str),
        capture_stdout=True,
        check=False,
        pass_fds=[spec.tap_fd],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert agent.returncode == -signal.SIGKILL
    return spec, msgspec.json.decode(agent.stdout.splitlines()[-1], type=VmProcess)


async def test_vms_outlive_a_killed_agent(qemu, orphan):
    """kill -9 of the agent's process: the same VM runs on, is found by its directory, adopted, and killed."""
    spec, process = orphan
    assert qemu.driver.find_orphans(qemu.root) == {spec.directory: process}
    vm = await qemu.driver.adopt(spec, process)
    await console_has(vm, "init runs: idle")
    await vm.kill()
    assert (await vm.wait_exit()) == "the VM was ended by the agent"
    assert qemu.driver.find_orphans(qemu.root) == {}


async def test_the_end_of_an_adopted_vm_is_noticed(qemu, orphan):
    """A VM that is not our child: its end is seen through the pidfd all the same, without an exit status."""
    spec, process = orphan
    vm = await qemu.driver.adopt(spec, process)
    os.kill(process.pid, signal.SIGSEGV)
    assert await vm.wait_exit() == "QEMU is gone"
    assert vm.statistics() is None


async def test_a_hung_qemu_can_be_killed(qemu, monkeypatch):
    """QEMU stopped dead answers nothing: asking for the console ends in time, and kill works."""
    vm = await qemu.driver.boot(qemu.spec())
    monkeypatch.setattr(qemu_vm, "QMP_TIMEOUT", 0.2)
    os.kill(vm.process.pid, signal.SIGSTOP)
    with trio.fail_after(30):
        await vm.console_tail()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.wait_exit)
            await vm.kill()
    assert qemu.driver.find_orphans(qemu.root) == {}


async def test_a_console_flood_costs_nothing(qemu):
    """A guest that writes without end: bounded text, no escape sequences, not a byte on the host's disk."""
    vm = await qemu.driver.boot(qemu.spec(mode="flood"))
    await console_has(vm, "all work and no play")
    before = allocated(qemu.root)
    memory = vm.statistics().resident_bytes
    await trio.sleep(1)
    with trio.fail_after(60):
        while len(console := await vm.console_tail()) <= MAX_CONSOLE_BYTES // 2:
            await trio.sleep(0.1)
    assert len(console) <= MAX_CONSOLE_BYTES
    assert "\x1b" not in console
    assert allocated(qemu.root) == before
    assert vm.statistics().resident_bytes - memory < 64 << 20


def allocated(directory):
    return sum(path.lstat().st_blocks for path in directory.rglob("*"))


async def test_a_vm_runs_without_privileges(qemu, monkeypatch):
    """Its own user, no groups, no way back up, QEMU's system call filter on, no core dumps, none of our environment."""
    monkeypatch.setenv("CAPSULE_TEST_SECRET", "s3cret")
    before = os.getgroups()
    os.setgroups([4, 27])
    try:
        vm = await qemu.driver.boot(qemu.spec(mode="poweroff"))
    finally:
        os.setgroups(before)
    fields = status(vm.process)
    assert fields["Uid"].split() == fields["Gid"].split() == ["64321"] * 4
    assert (fields["Groups"], fields["NoNewPrivs"], fields["Seccomp"]) == ("", "1", "2")
    proc = Path(f"/proc/{vm.process.pid}")
    assert "Max core file size        0                    0" in (proc / "limits").read_text()
    assert b"s3cret" not in (proc / "environ").read_bytes()
    assert os.getsid(vm.process.pid) == vm.process.pid
    assert (await vm.wait_exit()).startswith("the guest powered off")


async def test_a_vm_inherits_nothing_but_its_own(qemu):
    """Descriptors: its sockets, log, disk, tap and memory; the memory has no name and leaves nothing behind."""
    secret = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(secret, True)
    spec = qemu.spec()
    vm = await qemu.driver.boot(spec)
    os.close(secret)
    expected = {str(spec.disk), str(spec.directory / "vmm.log"), "/dev/null", "/dev/net/tun"}
    for _ in range(200):
        links = descriptors(vm.process)
        named = {link for link in links if not link.startswith(("socket:", "anon_inode:", "/memfd:"))}
        if named == expected:
            break  # what a thread that starts looks up in /sys is open for a moment; what is inherited stays
        await trio.sleep(0.05)
    assert named == expected
    assert any(link.startswith("/memfd:memory") for link in links)


async def test_a_vm_is_in_a_group_of_its_own(qemu):
    """One control group per VM while it lives, none afterwards."""
    if qemu.cgroups._parent is None:
        pytest.skip("no version 2 control groups here")
    vm = await qemu.driver.boot(qemu.spec())
    group = qemu.cgroups._parent / "one"
    assert (group / "cgroup.procs").read_text().split() == [str(vm.process.pid)]
    await vm.kill()
    assert not group.exists()


@pytest.fixture
def small_disk(root):
    """A file system of 1 MiB."""
    path = root / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=711", "capsule-test", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


async def test_a_full_host_disk_is_an_error_in_the_guest(qemu, small_disk):
    """Not a VM that silently stands still: the guest gets EIO and goes on."""
    disk = small_disk / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    vm = await qemu.driver.boot(qemu.spec(mode="fill", disk=disk))
    assert "disk: I/O error" in await console_has(vm, "still running")


async def test_a_disk_can_be_written(qemu):
    """The control of the test above: with room the same guest writes the whole disk."""
    spec = qemu.spec(mode="fill")
    vm = await qemu.driver.boot(spec)
    assert "disk: all written" in await console_has(vm, "still running")
    assert spec.disk.read_bytes() == b"x" * (1 << 20)


async def test_a_broken_image_is_said_in_qemus_words(qemu):
    """A disk that is no qcow2 file: VmStartFailed names it, and nothing is left."""
    with pytest.raises(VmStartFailed, match="not in qcow2 format"):
        await qemu.driver.boot(qemu.spec(disk_format="qcow2"))
    assert qemu.driver.find_orphans(qemu.root) == {}


async def test_a_missing_disk_is_said(qemu):
    """Not even started."""
    with pytest.raises(VmStartFailed, match=r"absent\.raw"):
        await qemu.driver.boot(qemu.spec(disk=qemu.root / "absent.raw"))


async def test_a_cancelled_boot_leaves_nothing(qemu, monkeypatch):
    """The client gives up while QEMU starts: it is killed and reaped, and its group is gone."""
    started = trio.Event()
    pids = []

    async def wait_ready(vm):
        pids.append(vm.process.pid)
        started.set()
        await trio.sleep_forever()

    monkeypatch.setattr(QemuVm, "wait_ready", wait_ready)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(qemu.driver.boot, qemu.spec())
        await started.wait()
        nursery.cancel_scope.cancel()
    assert inspect(pids[0]) is None
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    if qemu.cgroups._parent is not None:
        assert not (qemu.cgroups._parent / "one").exists()


async def test_a_boot_that_never_answers_is_given_up(qemu, monkeypatch):
    """QEMU hangs at start: VmStartFailed after the time-out, nothing left."""
    monkeypatch.setattr("agent.vmm.qemu.BOOT_TIMEOUT", 0.3)

    async def wait_ready(_vm):
        await trio.sleep_forever()

    monkeypatch.setattr(QemuVm, "wait_ready", wait_ready)
    with pytest.raises(VmStartFailed, match="did not answer"):
        await qemu.driver.boot(qemu.spec())
    assert qemu.driver.find_orphans(qemu.root) == {}


async def test_a_directory_with_a_long_name_is_no_problem(qemu):
    """A unix socket's address holds 107 bytes; a state directory's path may be longer."""
    spec = qemu.spec()
    directory = qemu.root / ("d" * 120) / "e"
    directory.mkdir(parents=True)
    vm = await qemu.driver.boot(replace(spec, directory=directory))
    await console_has(vm, "init runs")
    assert qemu.driver.find_orphans(qemu.root) == {directory: vm.process}


async def test_a_vm_whose_directory_was_removed_is_still_an_orphan(qemu):
    """Somebody deleted the state of a running VM: the process is found all the same."""
    spec = qemu.spec()
    vm = await qemu.driver.boot(spec)
    for path in spec.directory.iterdir():
        path.unlink()
    spec.directory.rmdir()
    assert qemu.driver.find_orphans(qemu.root) == {spec.directory: vm.process}


async def test_who_merely_sits_in_the_directory_is_no_orphan(qemu):
    """An operator's shell in a VM's directory is not killed for it, nor a QEMU that is not ours."""
    directory = qemu.root / "one"
    directory.mkdir()
    strangers = [["sleep", "60"], ["qemu-system-x86_64", "-M", "none", "-display", "none", "-name", "mine"]]
    async with trio.open_nursery() as nursery:
        for command in strangers:
            await nursery.start(partial(trio.run_process, command, cwd=directory, check=False))
        assert qemu.driver.find_orphans(qemu.root) == {}
        nursery.cancel_scope.cancel()
