"""kill -9 of the pager: its successor finds every VM again, and no guest notices more than a wait."""

from __future__ import annotations

import os
import random
import signal
from contextlib import asynccontextmanager

import pytest
import trio

from agent.pager.abi import is_userfaultfd, take_descriptor
from agent.pager.service import PagingFailed
from agent.snapshots.pagemap import Mapping, written

PAGE = 4096


@asynccontextmanager
async def stopped_pager(world):
    """SIGSTOP, and after the block SIGKILL; its supervisor starts the next one."""
    pid = world.pager_pid()
    os.kill(pid, signal.SIGSTOP)
    yield
    await world.kill_pager()


async def wait_for_fault(vmm, descriptors):
    """Read the event of the VM's next fault ourselves: from then on nobody else hears of it."""
    pidfd = os.pidfd_open(vmm.pid)
    number = next(fd for fd in descriptors(vmm.pid) if is_userfaultfd(fd, process=str(vmm.pid)))
    fd = take_descriptor(pidfd, number)
    try:
        await trio.lowlevel.wait_readable(fd)
        return os.read(fd, 32)
    finally:
        trio.lowlevel.notify_closing(fd)
        os.close(fd)
        os.close(pidfd)


async def test_a_fault_that_was_in_hand_is_answered_by_the_successor(world, snapshot, descriptors):
    """Its event has been read, so the kernel tells nobody again: the waiting thread must be woken to fault anew."""
    vmm = await world.start(snapshot)
    await vmm.ask("peek 0")
    page = next(page for page in range(1000, 2000) if snapshot.memory[page * PAGE])
    async with stopped_pager(world):
        await vmm.send(f"peek {page * PAGE}")
        assert len(await wait_for_fault(vmm, descriptors)) == 32
    assert await vmm.answer() == str(snapshot.memory[page * PAGE])
    assert await vmm.ask("verify 2 4") == "same"


@pytest.mark.parametrize(("regions", "options"), [(1, "-"), (3, "w")])
async def test_many_deaths_while_memory_is_touched(world, large_snapshot, regions, options):
    """Killed again and again while four threads of each of two VMs fault: both read exactly the snapshot, and the
    agent's calls are answered in between."""
    rng = random.Random(9)
    vmms = [await world.start(large_snapshot, name, regions=regions, options=options) for name in ("one", "two")]
    for number, vmm in enumerate(vmms):
        await vmm.send(f"verify 4 {number + 11}")
    for _ in range(5):
        await trio.sleep(rng.uniform(0, 0.03))
        await world.kill_pager()
        assert set(await world.client.statistics()) == {"one", "two"}
    for vmm in vmms:
        assert await vmm.answer() == "same"


async def test_what_was_given_back_stays_zeros(world, snapshot):
    """The successor learns it from the kernel: not there, but written. A page that was never touched stays the
    snapshot's."""
    vmm = await world.start(snapshot, options="r")
    await world.client.record_working_set("one")
    page = next(page for page in range(2, 2000) if all(snapshot.memory[(page + i) * PAGE] for i in range(-1, 5)))
    await vmm.ask(f"remove {page * PAGE} {4 * PAGE}")
    mapping = Mapping(vmm.address, len(snapshot.memory))
    with trio.fail_after(20):
        while written(vmm.pid, [mapping])[1] != [(page * PAGE, 4 * PAGE)]:  # the kernel lets us say so when it is done
            await trio.sleep(0.001)
    await world.kill_pager()
    assert await vmm.ask(f"peek {(page + 2) * PAGE}") == "0"
    assert await vmm.ask(f"peek {(page + 4) * PAGE}") == str(snapshot.memory[(page + 4) * PAGE])
    assert await vmm.ask(f"peek {(page - 1) * PAGE}") == str(snapshot.memory[(page - 1) * PAGE])


async def test_pages_that_the_guest_wrote_are_not_brought_again(world, snapshot):
    """What is there is found out anew, and is the guest's."""
    vmm = await world.start(snapshot)
    for page in range(0, 200, 7):
        await vmm.ask(f"write {page * PAGE} {PAGE} 77")
    await world.kill_pager()
    for page in range(0, 200, 7):
        assert await vmm.ask(f"peek {page * PAGE + 9}") == "77"
    page = next(page for page in range(201, 2000) if snapshot.memory[page * PAGE])
    assert await vmm.ask(f"peek {page * PAGE}") == str(snapshot.memory[page * PAGE])


async def test_a_vm_that_ended_meanwhile_is_forgotten(world, snapshot):
    """Its record goes; the others are adopted."""
    vmm = await world.start(snapshot)
    other = await world.start(snapshot, "two")
    async with stopped_pager(world):
        vmm.process.kill()
        await vmm.process.wait()
    assert await other.ask("verify 1 1") == "same"
    await world.client.record_working_set("two")
    with trio.fail_after(30):
        while [entry.stem for entry in (world.directory / "vms").iterdir()] != ["two"]:
            await trio.sleep(0.01)
    with pytest.raises(PagingFailed, match="ended"):
        await world.client.wait_connected("one", timeout=30)


async def test_a_vmm_that_has_not_come_yet_finds_the_successor(world, snapshot, descriptors):
    """The socket is made again; the agent that waits for the VMM goes on waiting."""
    vm = world.vm(snapshot)
    await world.client.listen(vm)
    async with trio.open_nursery() as nursery:
        waiting = trio.Event()

        async def wait():
            await world.client.wait_connected("one", timeout=30)
            waiting.set()

        nursery.start_soon(wait)
        await world.kill_pager()
        await world.client.statistics()
        assert not waiting.is_set()
        vmm = await world.spawn(vm, 8, 1, "-", snapshot.model)
        with trio.fail_after(30):
            await waiting.wait()
    assert await vmm.ask("verify 2 3") == "same"


async def test_a_snapshot_that_is_damaged_by_then_ends_the_vm_that_needs_it(world, snapshot):
    """One that has all of its memory goes on; the other would wait for ever at its next fault, or read zeros: it is
    killed then, with a reason that names the file."""
    vmm = await world.start(snapshot)
    other = await world.start(snapshot, "two")
    assert await other.ask("verify 1 1") == "same"
    header = snapshot.directory / "mem.header"
    header.write_bytes(header.read_bytes()[:-5])
    await world.kill_pager()
    await world.client.statistics()
    assert await other.ask("verify 1 1") == "same"
    await vmm.send("verify 1 1")
    with trio.fail_after(30):
        await vmm.process.wait()
    assert str(header) in await world.client.failure("one")


async def test_a_vmm_that_closed_its_descriptor_is_ended(world, snapshot):
    """Its memory was let loose when the pager died: it may have read zeros."""
    vmm = await world.start(snapshot)
    await vmm.ask("close")
    await world.kill_pager()
    with trio.fail_after(30):
        await vmm.process.wait()
    assert "userfaultfd" in await world.client.failure("one")


async def test_a_record_that_cannot_be_read_keeps_nobody_from_being_served(world, snapshot):
    """It is put aside."""
    vmm = await world.start(snapshot)
    (world.directory / "vms" / "bad.json").write_bytes(b"{")
    await world.kill_pager()
    assert await vmm.ask("verify 1 1") == "same"
    assert (world.directory / "vms" / "bad.damaged").exists()
