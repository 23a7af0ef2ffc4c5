"""How a test steers the fake driver: failures before or after a call's work, calls held half way, a counting guest."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from agent.vmm.driver import VmCommandFailed, VmDiskFull, VmGone, VmStartFailed, VmState, VmStateFailed


@pytest.fixture
async def vm(fake):
    return await fake.driver.boot(fake.counting_spec())


async def test_each_call_fails_once_when_told(fake, vm):
    """With its own typed error, or the one asked for; the next call works."""
    for call, ask in (("pause", vm.pause), ("paused", vm.paused), ("resume", vm.resume), ("disk_file", vm.disk_file)):
        fake.driver.fail_next(call, "because")
        with pytest.raises(VmCommandFailed, match="because"):
            await ask()
        await ask()
    await vm.pause()
    fake.driver.fail_next("save_state", "first")
    fake.driver.fail_next("save_state", "second", error=VmDiskFull)
    with pytest.raises(VmStateFailed, match="first"):
        await vm.save_state(fake.root / "state")
    with pytest.raises(VmDiskFull, match="second"):
        await vm.save_state(fake.root / "state")
    await vm.save_state(fake.root / "state")
    fake.driver.fail_next("restore", "no")
    with pytest.raises(VmStartFailed, match="no"):
        await fake.driver.restore(fake.counting_spec("clone"), VmState(fake.root / "state", fake.root))
    fake.driver.fail_next("memory", "gone", error=VmGone)
    with pytest.raises(VmGone):
        vm.memory()
    os.close(vm.memory().fd)


async def test_a_call_may_fail_after_its_work(fake, vm):
    """As when QEMU answers too late: the caller cannot know, and has to ask."""
    fake.driver.fail_next("pause", "no answer", done=True)
    with pytest.raises(VmCommandFailed):
        await vm.pause()
    assert await vm.paused()


async def test_a_call_can_be_held_half_way(fake, vm):
    """Until the test lets it go; a VM that dies meanwhile is gone."""
    gate = fake.driver.hold("pause")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vm.pause)
        await trio.testing.wait_all_tasks_blocked()
        assert not await vm.paused()
        gate.set()
    assert await vm.paused()
    gate = fake.driver.hold("resume")

    async def resume():
        with pytest.raises(VmGone, match="crashed"):
            await vm.resume()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(resume)
        await trio.testing.wait_all_tasks_blocked()
        fake.crash(vm)
        gate.set()


async def test_its_memory_can_be_captured(fake, vm):
    """A sparse file of the VM's size: what the guest wrote is data, all else a hole."""
    machine = fake.driver.machine("one")
    machine.write(8192, b"written")
    memory = vm.memory()
    assert memory.size == os.fstat(memory.fd).st_size == 96 << 20
    assert os.lseek(memory.fd, 0, os.SEEK_DATA) == 8192
    assert os.lseek(memory.fd, 8192, os.SEEK_HOLE) == 12288
    assert machine.read(8192, 7) == b"written"
    os.close(memory.fd)
