"""A VM that dies by itself, and VMs, disks and directories that will not go."""

from __future__ import annotations

import errno

import pytest
import trio
from sandbox_world import create_body, request, sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.sandboxes.removal import CLEAN_UP
from agent.storage.overlay import StorageTimeout
from agent.wire.calls import HostListing, parse
from agent.wire.faults import Fault, FaultCode

ONE, TWO = sandbox_id(1), sandbox_id(2)


async def test_a_death_is_told_and_cleaned_up(host, autojump_clock):
    """Noticed at once, by whoever watches; in the outbox with its reason; nothing is left but the entry."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        async with control_plane.open_stream("host.watch", {}) as watch:
            await anext(watch)
            began = trio.current_time()
            host.vms.machine(ONE).die("the guest's kernel panicked: oh no")
            while not agent.told():
                await anext(watch)
            assert trio.current_time() == began
        listing = parse(HostListing, await control_plane.call("host.list", {}, timeout=5))
        assert [(e.sandbox_id, e.event, e.reason) for e in listing.outbox] == [
            (ONE, "died", "the guest's kernel panicked: oh no")
        ]
        await agent.check()
        with pytest.raises(Fault, match="has ended"):
            await control_plane.call("sandbox.create", create_body(ONE), timeout=5)
        await control_plane.call("sandbox.destroy", {"sandbox_id": ONE}, timeout=5)


async def test_the_entry_is_durable_before_the_clean_up(host, autojump_clock):
    """Killed right after the entry: it is there. Killed right before: the next agent sees that the VM has gone."""
    async with host.agent() as agent:
        await agent.create(ONE)
        steps = []
        host.on_step = steps.append
        host.vms.machine(ONE).die("boom")
        await wait_all_tasks_blocked()
        host.on_step = lambda name: None
        assert steps[:2] == ["fsync", "fsync"]
        assert steps.index("kill") > 2


async def test_paths_stay_with_the_host(host, autojump_clock):
    """A VMM's last words name our directories; what users read does not."""
    async with host.agent() as agent:
        await agent.create(ONE)
        host.vms.machine(ONE).die(f"QEMU exited with status 1; it said: {host.root}/disk.qcow2: Input/output error")
        await wait_all_tasks_blocked()
        (entry,) = agent.outbox.entries()
        assert entry.reason == "QEMU exited with status 1; it said: …: Input/output error"


async def test_a_death_beside_a_destroy(host, autojump_clock):
    """Both in the same moment, in either order: one clean-up, the destroy is answered."""
    for first in ("die", "destroy"):
        async with host.agent() as agent, trio.open_nursery() as nursery:
            await agent.create(ONE)
            sandbox = agent.manager.find(ONE)
            for event in (first, {"die": "destroy", "destroy": "die"}[first]):
                if event == "die":
                    host.vms.machine(ONE).die("boom")
                else:
                    nursery.start_soon(agent.destroy, ONE)
            await sandbox.gone.wait()
            await agent.check()
            assert host.steps.count("kill") == 1


async def test_a_vm_that_will_not_die_at_once(host, autojump_clock):
    """Tried again with growing pauses; its disk and slot stay until it has gone."""
    async with host.agent() as agent, trio.open_nursery() as nursery:
        await agent.create(ONE)
        machine = host.vms.machine(ONE)
        machine.unkillable = True
        nursery.start_soon(agent.destroy, ONE)
        await trio.sleep(3)
        assert agent.statuses() == {ONE: "stopping"}
        assert (host.state.directory(ONE) / "disk.qcow2").exists()
        assert agent.slots.statistics().in_use == 1
        with pytest.raises(Fault) as caught:
            agent.manager.find(ONE).guest()
        assert caught.value.details == {"status": "stopping"}
        machine.unkillable = False
        await agent.manager.find(ONE).gone.wait()
        await agent.check()


async def test_a_vm_that_never_dies(host, autojump_clock):
    """In the end a fault says so. The disk and the slot stay, the id is refused, the next agent tries again."""
    async with host.agent() as agent:
        await agent.create(ONE)
        machine = host.vms.machine(ONE)
        machine.unkillable = True
        with pytest.raises(Fault, match="will try again later") as caught:
            await agent.destroy(ONE)
        assert caught.value.code == FaultCode.INTERNAL
        assert host.steps.count("kill") == CLEAN_UP.restarts
        assert agent.statuses() == {}
        assert agent.slots.statistics().in_use == 1
        with pytest.raises(Fault, match="has ended"):
            await agent.create(ONE)
        await agent.create(TWO)
    async with host.agent() as agent:
        assert agent.statuses().keys() == {TWO}, "it does not keep the agent from its other VMs"
        assert agent.slots.statistics().in_use == 2, "nobody else gets its slot"
        assert host.directories() == {ONE, TWO}
    machine.unkillable = False
    async with host.agent() as agent:
        await agent.check()
        assert agent.statuses().keys() == {TWO}


async def test_a_disk_that_will_not_go(host, autojump_clock):
    """Any error of a removal is tried again, a bug's too; the VM is not killed twice."""
    async with host.agent() as agent:
        await agent.create(ONE)
        host.overlays.remove_errors = [StorageTimeout("slow"), OSError("bad"), ValueError("a bug")]
        await agent.destroy(ONE)
        await agent.check()
        assert host.steps.count("kill") == 1


def full_disk(host, monkeypatch):
    """From now on writes fail, until an overlay has been removed."""

    def on_step(name):
        if name == "fsync":
            raise OSError(errno.ENOSPC, "No space left on device")
        if name == "overlay_removed":
            host.on_step = lambda name: None

    host.on_step = on_step


async def test_destroy_on_a_full_disk(host, autojump_clock, monkeypatch):
    """What fills the disk can be destroyed, though not even its record can be written."""
    async with host.agent() as agent:
        await agent.create(ONE)
        full_disk(host, monkeypatch)
        began = trio.current_time()
        await agent.destroy(ONE)
        assert trio.current_time() == began
        await agent.check()


async def test_a_destroy_on_a_full_disk_is_not_taken_for_a_death(host, autojump_clock):
    """Its record says `running` to the end, so it must go before the rest: the next agent has nothing to tell."""
    async with host.agent() as agent:
        await agent.create(ONE)

        def on_step(name):
            if name == "fsync":
                raise OSError(errno.ENOSPC, "No space left on device")
            if name == "rmtree":
                agent.kill()

        host.on_step = on_step
        await agent.destroy(ONE)
    host.on_step = lambda name: None
    async with host.agent() as agent:
        assert agent.told() == []
        await agent.check()


async def test_death_on_a_full_disk(host, autojump_clock, monkeypatch):
    """It is told as soon as its own disk has made room, and before the last trace goes."""
    async with host.agent() as agent:
        await agent.create(ONE)
        full_disk(host, monkeypatch)
        host.vms.machine(ONE).die("boom")
        await wait_all_tasks_blocked()
        assert agent.told() == [(ONE, "died")]
        await agent.check()
    async with host.agent() as agent:
        assert agent.told() == [(ONE, "died")]


@pytest.mark.parametrize("failures", [1, 2, 1000])
async def test_an_agent_killed_on_a_full_disk_tells_later(host, autojump_clock, failures):
    """A death that could not be written down is told by the next agent, also if the disk was full but for a moment."""
    async with host.agent() as agent:
        await agent.create(ONE)
        left = failures

        def on_step(name):
            nonlocal left
            if name == "overlay_removed":
                agent.kill()
            elif name == "fsync" and left:
                left -= 1
                raise OSError(errno.ENOSPC, "No space left on device")

        host.on_step = on_step
        host.vms.machine(ONE).die("boom")
        await trio.sleep_forever()
    host.on_step = lambda name: None
    async with host.agent() as agent:
        assert agent.told() == [(ONE, "died")]
        await agent.check()


async def test_watching_that_fails_is_not_a_death(host, autojump_clock, monkeypatch):
    """No descriptor left to watch with, say: it is tried again, and the VM lives."""
    async with host.agent() as agent:
        await agent.create(ONE)
        vm_class = type(agent.manager.find(ONE).made.vm)
    attempts = []
    initialise = vm_class.__init__

    def with_bad_watch(vm, owner, inner):
        initialise(vm, owner, inner)

        async def wait_exit():
            attempts.append(1)
            if len(attempts) < 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return await inner.wait_exit()

        vm.wait_exit = wait_exit

    monkeypatch.setattr(vm_class, "__init__", with_bad_watch)
    async with host.agent() as agent:
        await trio.sleep(30)
        assert len(attempts) == 3
        await agent.check()
        host.vms.machine(ONE).die("boom")
        await wait_all_tasks_blocked()
        assert agent.told() == [(ONE, "died")]


async def test_a_guest_link_with_a_bug_costs_one_guest(host, autojump_clock, monkeypatch):
    """What a guest may provoke in the link to it ends that link for a moment, not the agent of all."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.create(TWO)
        link = agent.manager.find(ONE).guest()._link

        async def broken(_peer):
            raise KeyError("a bug")

        monkeypatch.setattr(link, "_serve", broken)
        agent.manager.find(ONE).guest().hang_up()
        await trio.sleep(5)
        assert agent.statuses() == {ONE: "running", TWO: "running"}
        monkeypatch.undo()
        answer = await agent.manager.find(ONE).guest().call("exec", {"cmd": "x"}, timeout=15)
        assert answer["exit_code"] == 0


async def test_a_create_of_a_sandbox_that_is_ending(host, autojump_clock):
    """One that ran and is being removed is refused, not joined."""
    async with host.agent() as agent, trio.open_nursery() as nursery:
        await agent.create(ONE)
        host.vms.machine(ONE).unkillable = True
        nursery.start_soon(agent.destroy, ONE)
        await wait_all_tasks_blocked()
        with pytest.raises(Fault) as caught:
            await agent.manager.create(request(ONE))
        assert caught.value.code == FaultCode.INVALID_STATE
        host.vms.machine(ONE).unkillable = False
