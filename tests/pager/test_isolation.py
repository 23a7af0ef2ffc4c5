"""What is slow or broken about one VM is not another's: a pager in the test's own process, over memory with moods."""

from __future__ import annotations

import errno
import threading
from contextlib import asynccontextmanager

import pytest
import trio

from agent.pager import serving, vm
from agent.pager.abi import Userfault
from agent.pager.filling import Staging
from agent.pager.records import VmRecords
from agent.pager.serving import Shared
from agent.pager.snapshot import OpenSnapshot
from agent.pager.sockets import listen_unix
from agent.pager.vm import Means, VmPaging
from agent.snapshots.errors import WouldBlock

PAGE = 4096
COLD = 1024 * PAGE
"""Above this, memory with a slow disk is not in the page cache."""


class Memory:
    """A snapshot's memory; `disk` says when the disk has answered."""

    def __init__(self, content, *, error=None):
        self.content = content
        self.error = error
        self.disk = threading.Event()
        self.asked = threading.Event()
        self.closed = False

    def read_into(self, offset, buffer, *, wait=True):
        assert not self.closed
        if offset >= COLD and not self.disk.is_set():
            if not wait:
                raise WouldBlock
            self.asked.set()
            self.disk.wait(40)
            if self.error:
                raise self.error
        buffer[:] = self.content[offset : offset + len(buffer)]

    def close(self):
        self.closed = True


@pytest.fixture
async def here(world, snapshot):
    """`start(vm_id, memory)`: a VM served by this process."""
    records = VmRecords(world.root / "here")
    records.prepare()
    means = Means(records, Shared(Staging(), Staging(), trio.CapacityLimiter(2)), trio.Lock())

    @asynccontextmanager
    async def open_here():
        async with trio.open_nursery() as nursery:

            async def start(vm_id, memory):
                about = world.vm(snapshot, vm_id)
                listener = listen_unix(about.socket, uid=0)
                opened = OpenSnapshot(memory, len(snapshot.memory))
                paging = VmPaging(about, means, connect_timeout=20, snapshot=opened)
                nursery.start_soon(paging.run, listener)
                vmm = await world.spawn(about, 8, 1, "-", snapshot.model)
                await paging.settled.wait()
                return paging, vmm

            yield start
            nursery.cancel_scope.cancel()

    async with open_here() as start:
        yield start


async def until(event):
    with trio.fail_after(30):
        while not event.is_set():
            await trio.sleep(0.005)


async def test_a_disk_read_of_one_vm_stops_no_other(here, snapshot):
    """It takes for ever; another VM reads all of its memory meanwhile. When the disk answers, so does the pager."""
    slow, quick = Memory(snapshot.memory), Memory(snapshot.memory)
    quick.disk.set()
    _, waiting = await here("slow", slow)
    _, other = await here("quick", quick)
    await waiting.send(f"peek {COLD}")
    await until(slow.asked)
    assert await other.ask("verify 4 4") == "same"
    slow.disk.set()
    assert await waiting.answer() == str(snapshot.memory[COLD])
    assert await waiting.ask("verify 2 2") == "same"


async def test_a_stop_during_a_disk_read_does_not_hang(here, snapshot, monkeypatch, descriptors):
    """It gives up waiting; everything is closed when the disk has answered, and not before."""
    monkeypatch.setattr(vm, "SETTLE_TIMEOUT", 0.2)
    memory = Memory(snapshot.memory)
    before = len(descriptors())
    paging, vmm = await here("slow", memory)
    await vmm.send(f"peek {COLD}")
    await until(memory.asked)
    with trio.fail_after(20):
        await paging.stop()
    assert not memory.closed
    memory.disk.set()
    with trio.fail_after(20):
        while not memory.closed:
            await trio.sleep(0.01)
    assert len(descriptors()) <= before + 3  # the VMM's pipes, and its pidfd


async def test_a_bug_ends_its_vm_and_no_other(here, snapshot):
    """Whatever is raised: the VM is killed, since it would wait for ever; the pager serves on."""
    memory = Memory(snapshot.memory, error=RuntimeError("a bug"))
    fine = Memory(snapshot.memory)
    fine.disk.set()
    paging, vmm = await here("broken", memory)
    _, other = await here("fine", fine)
    await vmm.send(f"peek {COLD}")
    await until(memory.asked)
    memory.disk.set()
    with trio.fail_after(20):
        await vmm.process.wait()
    assert "log has the details" in paging.failure
    assert await other.ask("verify 2 2") == "same"


async def test_no_memory_for_a_page_is_waited_for_and_then_a_reason(here, snapshot, monkeypatch):
    """A limit that is reached for a moment is nobody's end; one that stays ends the VM."""
    monkeypatch.setattr(serving, "MEMORY_PAUSE", 0.01)
    memory = Memory(snapshot.memory)
    memory.disk.set()
    paging, vmm = await here("small", memory)
    copy, refusals = Userfault.copy, [3]

    def refuse(self, address, source, length, mode):
        if refusals[0]:
            refusals[0] -= 1
            return 0, errno.ENOMEM
        return copy(self, address, source, length, mode)

    monkeypatch.setattr(Userfault, "copy", refuse)
    assert await vmm.ask("peek 0") == str(snapshot.memory[0])
    assert refusals == [0]
    refusals[0] = 1000
    await vmm.send(f"peek {COLD}")
    with trio.fail_after(30):
        await vmm.process.wait()
    assert "no memory" in paging.failure


async def test_a_failure_that_cannot_be_written_down_kills_nevertheless(here, snapshot, monkeypatch):
    """The disk is full: the VM must not hang for that."""

    def full(_self, _record):
        raise OSError(errno.ENOSPC, "No space left on device")

    memory = Memory(snapshot.memory, error=RuntimeError("a bug"))
    paging, vmm = await here("broken", memory)
    monkeypatch.setattr(VmRecords, "save", full)
    await vmm.send(f"peek {COLD}")
    await until(memory.asked)
    memory.disk.set()
    with trio.fail_after(20):
        await vmm.process.wait()
    assert paging.failure
