"""Files that somebody or something has changed: refused with a typed error that names the file, nothing is deleted."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import pytest
from sandbox_world import sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.wire.faults import Fault, FaultCode

ONE, TWO, THREE, SNAPSHOT = (sandbox_id(number) for number in (1, 2, 3, 100))


def everything(host):
    """All files of the store, by name, with their content."""
    root = host.state.snapshots
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def flip(file: Path, bit: int):
    data = bytearray(file.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    file.chmod(0o600)
    file.write_bytes(data)


FILES = ["manifest.json", "mem.header", "vm.state"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
async def test_a_damaged_snapshot(host, autojump_clock, name, how):
    """Of a paused sandbox: resume, copy and start are refused, the file named; still paused; also under a new agent."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.create(TWO)
        await agent.pause(ONE)
        base = agent.manager.find(ONE).made.record.base
        file = host.store().snapshot_directory(UUID(base)) / name
        if how == "flip":
            flip(file, 8 * 100 + 3)
        elif how == "cut":
            file.write_bytes(file.read_bytes()[:-10])
        else:
            file.unlink()
        before = everything(host)
        for ask in (lambda: agent.resume(ONE), lambda: agent.snapshot(SNAPSHOT, ONE)):
            with pytest.raises(Fault) as caught:
                await ask()
            assert caught.value.code == FaultCode.SNAPSHOT_DAMAGED
            assert name in caught.value.message
            assert base in caught.value.message
            assert str(host.root) not in caught.value.message
        assert agent.statuses() == {ONE: "paused", TWO: "running"}
        assert host.running() == {TWO}
        assert agent.slots.statistics().in_use == 1
        assert everything(host) == before
    async with host.agent() as agent:
        await wait_all_tasks_blocked()
        assert agent.statuses() == {ONE: "paused", TWO: "running"}
        assert everything(host) == before
        with pytest.raises(Fault) as caught:
            await agent.resume(ONE)
        assert caught.value.code == FaultCode.SNAPSHOT_DAMAGED
        await agent.pause(TWO)
        await agent.resume(TWO)
        await agent.destroy(ONE)
        assert agent.statuses() == {TWO: "running"}


async def test_a_parent_that_is_damaged(host, autojump_clock):
    """The pause of a running one whose parent is damaged: refused, it runs on, and nothing is deleted."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.pause(ONE)
        await agent.resume(ONE)
        base = agent.manager.find(ONE).made.record.base
        flip(host.store().snapshot_directory(UUID(base)) / "mem.header", 77)
        before = everything(host)
        with pytest.raises(Fault, match=r"mem\.header") as caught:
            await agent.pause(ONE)
        assert caught.value.code == FaultCode.SNAPSHOT_DAMAGED
        assert agent.statuses() == {ONE: "running"}
        assert everything(host) == before


async def test_a_snapshot_to_start_from(host, autojump_clock):
    """Refused before anything is started, and there for inspection."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.snapshot(SNAPSHOT, ONE)
        flip(host.store().snapshot_directory(UUID(SNAPSHOT)) / "vm.state", 5)
        before = everything(host)
        with pytest.raises(Fault, match=r"vm\.state") as caught:
            await agent.create(TWO, snapshot_id=SNAPSHOT)
        assert caught.value.code == FaultCode.SNAPSHOT_DAMAGED
        assert agent.statuses() == {ONE: "running"}
        assert everything(host) == before


@pytest.mark.parametrize("away", [False, True])
async def test_memory_that_cannot_be_served(host, autojump_clock, away):
    """The pager ends the VM: told with the file's name, everything kept, nothing listed; with and without an agent."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.pause(ONE)
        await agent.resume(ONE)
        await agent.create(TWO)
        before = everything(host)
        if not away:
            end_by_pager(host)
            await wait_all_tasks_blocked()
    if away:
        end_by_pager(host)
    async with host.agent() as agent:
        await wait_all_tasks_blocked()
        assert agent.told() == [(ONE, "died")]
        (entry,) = agent.outbox.entries()
        assert "builds/x/data is damaged" in entry.reason
        assert str(host.root) not in entry.reason
        assert agent.statuses() == {TWO: "running"}
        assert agent.slots.statistics().in_use == 1
        assert everything(host) == before
        assert host.state.load()[ONE].phase == "damaged"
        assert ONE in host.directories()
        assert (agent.manager.listing().paused, len(agent.manager.listing().sandboxes)) == ([], 1)


async def test_memory_that_was_not_served_for_another_reason(host, autojump_clock):
    """Its data is well: the VM has died as any other does, and nothing is kept for inspection."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.pause(ONE)
        await agent.resume(ONE)
        host.pager.fail_vm(ONE, "there is no memory for a page", damaged=False)
        host.vms.machine(ONE).die("killed by signal 9")
        await wait_all_tasks_blocked()
        assert agent.told() == [(ONE, "died")]
        (entry,) = agent.outbox.entries()
        assert "no memory for a page" in entry.reason
        assert host.directories() == set()


@pytest.mark.parametrize("away", [False, True])
async def test_a_kept_disk_belongs_to_no_slot(host, autojump_clock, away):
    """Its VM's user is the slot's next tenant: the disk is ours, and read only, before that can be; or the slot is not
    given out.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root: files of several users")
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.pause(ONE)
        await agent.resume(ONE)
        disk = host.vms.machine(ONE).disk
        os.chown(disk, host.vms.machine(ONE).spec.uid, host.vms.machine(ONE).spec.gid)
        if not away:
            end_by_pager(host)
            await wait_all_tasks_blocked()
    if away:
        end_by_pager(host)
    async with host.agent() as agent:
        await wait_all_tasks_blocked()
        assert (disk.stat().st_uid, disk.stat().st_gid, disk.stat().st_mode & 0o777) == (0, 0, 0o400)
        assert agent.slots.statistics().in_use == 0
    disk.rename(disk.with_name("moved"))
    disk.symlink_to("moved")
    async with host.agent() as agent:
        assert agent.slots.statistics().in_use == 1


def end_by_pager(host):
    host.pager.fail_vm(ONE, f"{host.state.snapshots}/builds/x/data is damaged between bytes 0 and 65536")
    host.vms.machine(ONE).die("killed by signal 9")


async def test_a_record_that_cannot_be_read(host, autojump_clock):
    """Of a paused one: its directory and its snapshot stay, the others are not concerned."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.create(TWO)
        await agent.pause(ONE)
    flip(host.state.directory(ONE) / "record.json", 3)
    before = everything(host)
    async with host.agent() as agent:
        await wait_all_tasks_blocked()
        assert agent.statuses() == {TWO: "running"}
        assert everything(host) == before
        assert host.directories() == {ONE, TWO}
