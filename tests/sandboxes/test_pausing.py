"""Pause and resume: what comes back, what is gone meanwhile, and what a failure leaves."""

from __future__ import annotations

import errno

import pytest
import trio
from sandbox_world import create_body, request, sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.net.errors import NoFreeSlots
from agent.pager.service import (
    ConnectTimeout,
    PagerUnavailable,
    PagingDamaged,
    PagingFailed,
    SnapshotNotOpened,
    SnapshotUnreadable,
)
from agent.storage import overlay as storage
from agent.vmm.driver import VmCommandFailed, VmDiskFull
from agent.wire.calls import HostListing, parse
from agent.wire.faults import Fault, FaultCode

ONE, TWO, SNAPSHOT = sandbox_id(1), sandbox_id(2), sandbox_id(100)


def remember(host, name, value, offset=4096):
    """Have the guest write to its memory."""
    host.vms.machine(name).write(offset, value)


async def test_over_the_wire(host, autojump_clock):
    """It runs, rests (no VM, no slot, no memory; in the listing as paused), runs again with its state; then goes."""
    async with host.agent() as agent, agent.connection() as control_plane:
        created = await control_plane.call("sandbox.create", create_body(ONE, envs={"A": "b"}), timeout=60)
        remember(host, ONE, b"remember")
        for _ in range(3):
            host.vms.machine(ONE).tick()
        state = await control_plane.call("sandbox.pause", {"sandbox_id": ONE}, timeout=60)
        assert state["status"] == "paused"
        assert {"settle", "stop", "state", "memory", "disk", "publish", "commit", "end"} <= state["timings_ms"].keys()
        assert state["timings_ms"]["stopped_ms"] > 0
        assert state["disk_bytes"] > 0
        await agent.check()
        assert host.running() == set()
        assert agent.slots.statistics().in_use == 0
        listing = parse(HostListing, await control_plane.call("host.list", {}, timeout=5))
        assert (listing.sandboxes, listing.paused) == ([], [ONE])
        state = await control_plane.call("sandbox.resume", {"sandbox_id": ONE}, timeout=60)
        assert state["status"] == "running"
        assert {"load", "slot", "overlay", "pager", "vmm", "memory", "cpus", "guest"} <= state["timings_ms"].keys()
        assert state["started_at"] == created["started_at"]
        machine = host.vms.machine(ONE)
        assert machine.tick() == 4, "the device state came back"
        await agent.check()
        configured = host.guests[state["host_ip"]].configured
        assert configured["machine_id"] == ONE.replace("-", "")
        assert configured["hostname"] == "sb"
        assert "envs" not in configured, "its guest has them"
        answer = await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "true"}, timeout=60)
        assert answer["exit_code"] == 0
        await control_plane.call("sandbox.pause", {"sandbox_id": ONE}, timeout=60)
        await control_plane.call("sandbox.destroy", {"sandbox_id": ONE}, timeout=60)
        await agent.check()
        assert host.store().list() == []


async def test_generations(host, autojump_clock):
    """Each snapshot has what changed, on its parent; the parent's directory goes, its builds stay as long as needed."""
    async with host.agent() as agent:
        await agent.create(ONE)
        remember(host, ONE, b"first___", 4096)
        await agent.pause(ONE)
        first = agent.manager.find(ONE).made.record.base
        assert host.memory(first, 4096) == b"first___"
        await agent.resume(ONE)
        remember(host, ONE, b"second__", 1 << 20)
        await agent.pause(ONE)
        second = agent.manager.find(ONE).made.record.base
        assert host.memory(second, 4096) == b"first___"
        assert host.memory(second, 1 << 20) == b"second__"
        assert [str(one.id) for one in host.store().list()] == [second]
        await agent.check()


async def test_already_so(host, autojump_clock):
    """A pause of a paused one and a resume of a running one are answered at once; a starting one takes neither."""
    host.guest_options = {"boots": False}
    async with host.agent() as agent:
        sandbox = await agent.manager.create(request(ONE))
        for ask in (sandbox.pause, sandbox.resume, lambda: sandbox.checkpoint(SNAPSHOT)):
            with pytest.raises(Fault) as caught:
                ask()
            assert (caught.value.code, caught.value.details) == (FaultCode.INVALID_STATE, {"status": "starting"})
        await wait_all_tasks_blocked()
        for guest in host.guests.values():
            guest.boots = True
        await sandbox.started.wait()
        assert (await agent.resume(ONE)).status == "running"
        await agent.pause(ONE)
        machines = len(host.vms.machines)
        assert (await agent.pause(ONE)).status == "paused"
        assert len(host.vms.machines) == machines


async def test_two_of_each(host, autojump_clock):
    """The second pauser gets the outcome of the first, also a failure; so do two who resume. One VM each time."""
    async with host.agent() as agent:
        await agent.create(ONE)
        sandbox = agent.manager.find(ONE)
        first, second = sandbox.pause(), sandbox.pause()
        assert first is second
        await first.wait()
        first, second = sandbox.resume(), sandbox.resume()
        assert await first.wait() == await second.wait()
        assert len(host.vms.machines) == 2
        host.vms.fail_next("save_state", "no", error=VmDiskFull)
        first, second = sandbox.pause(), sandbox.pause()
        for one in (first, second):
            with pytest.raises(Fault) as caught:
                await one.wait()
            assert caught.value.code == FaultCode.DISK_FULL
        await agent.check()


async def test_a_resume_queues_behind_a_pause(host, autojump_clock):
    """And a pause behind that, and so on: each gets its own outcome."""
    async with host.agent() as agent:
        await agent.create(ONE)
        sandbox = agent.manager.find(ONE)
        slots = [sandbox.pause(), sandbox.resume(), sandbox.pause(), sandbox.resume()]
        assert len({id(slot) for slot in slots}) == 4
        assert [(await slot.wait()).status for slot in slots] == ["paused", "running", "paused", "running"]
        await agent.check()


async def test_a_client_that_goes_away_changes_nothing(host, autojump_clock):
    """Trap 4: whoever asked for the pause hangs up in the middle, whatever it is at; it is paused, and resumes."""
    async with host.agent() as agent:
        await agent.create(ONE)
        for call, step, status in (
            ("sandbox.pause", "save_state", "paused"),
            ("sandbox.resume", "restore", "running"),
            ("sandbox.pause", "kill", "paused"),
        ):
            async with agent.connection() as control_plane, trio.open_nursery() as nursery:

                async def ask(control_plane=control_plane, call=call):
                    with pytest.raises(Fault):
                        await control_plane.call(call, {"sandbox_id": ONE}, timeout=60)

                def on_step(name, control_plane=control_plane, step=step):
                    if name == step:
                        control_plane.close()

                host.on_step = on_step
                nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            host.on_step = lambda name: None
            assert agent.statuses() == {ONE: status}
            await agent.check()
        await agent.resume(ONE)


PAUSE_FAILURES = [
    ("pause", VmCommandFailed("no"), FaultCode.INTERNAL),
    ("save_state", VmDiskFull("full"), FaultCode.DISK_FULL),
    ("saved_state", OSError(errno.EIO, "bad", "/a/secret/path"), FaultCode.INTERNAL),
    ("store_make_directory", OSError(errno.ENOSPC, "full"), FaultCode.DISK_FULL),
    ("store_create", OSError(errno.EDQUOT, "full"), FaultCode.DISK_FULL),
    ("overlay_freeze", storage.HostDiskFull("full"), FaultCode.DISK_FULL),
    ("overlay_freeze", storage.OverlayDamaged("a hostile VMM"), FaultCode.INTERNAL),
    ("store_link", OSError(errno.EIO, "bad"), FaultCode.INTERNAL),
    ("store_rename", OSError(errno.ENOSPC, "full"), FaultCode.DISK_FULL),
    ("fsync", OSError(errno.ENOSPC, "full"), FaultCode.DISK_FULL),
    ("save_state", ValueError("a bug"), FaultCode.INTERNAL),
]


@pytest.mark.parametrize(("step", "error", "code"), PAUSE_FAILURES)
@pytest.mark.parametrize("again", [False, True])
async def test_a_failing_pause(host, autojump_clock, step, error, code, again):
    """Trap 3: at any step: a clear fault, the sandbox runs on as before, and its parent generation is still there."""
    async with host.agent() as agent:
        await agent.create(ONE)
        remember(host, ONE, b"first___")
        if again:
            await agent.pause(ONE)
            await agent.resume(ONE)
            remember(host, ONE, b"second__", 8192)
        before = agent.manager.find(ONE).made.record
        process = host.vms.machine(ONE).process

        def on_step(name):
            if name == step:
                host.on_step = lambda name: None
                raise error

        host.on_step = on_step
        with pytest.raises(Fault) as caught:
            await agent.pause(ONE)
        assert caught.value.code == code
        assert caught.value.retryable
        assert "/" not in caught.value.message
        if code == FaultCode.DISK_FULL:
            assert caught.value.message == "the host's disk is full; the sandbox runs on"
        assert host.vms.machine(ONE).process == process
        assert agent.manager.find(ONE).made.record == before
        await agent.check()
        assert (await agent.manager.find(ONE).guest().call("exec", {"cmd": "x"}, timeout=5))["exit_code"] == 0
        await agent.pause(ONE)
        base = agent.manager.find(ONE).made.record.base
        assert host.memory(base, 4096) == b"first___"
        assert host.memory(base, 8192) == (b"second__" if again else bytes(8))
        await agent.check()


async def test_a_guest_that_does_not_settle(host, autojump_clock):
    """Best effort, 3 s: it is paused all the same."""
    stuck = trio.Event()

    async def answer(method, body, stream):
        if method == "settle":
            await stuck.wait()
        return {}

    host.guest_options = {"answer": answer}
    async with host.agent() as agent:
        await agent.create(ONE)
        began = trio.current_time()
        await agent.pause(ONE)
        assert 3 <= trio.current_time() - began < 6
        assert agent.statuses() == {ONE: "paused"}


async def test_a_vm_that_does_not_go_on_at_once(host, autojump_clock):
    """After a failed pause it is told again until it does, in the background if need be."""
    async with host.agent() as agent:
        await agent.create(ONE)
        host.vms.fail_next("save_state", "no")
        for _ in range(20):
            host.vms.fail_next("resume", "busy")
        with pytest.raises(Fault):
            await agent.pause(ONE)
        assert agent.statuses() == {ONE: "running"}
        await trio.sleep(200)
        await agent.check()


async def test_calls_under_way(host, autojump_clock):
    """They end when the sandbox has been paused, and say so; those that wait or come are refused with its status."""
    release = trio.Event()

    async def answer(method, body, stream):
        if method == "exec":
            await release.wait()
        return {}

    host.guest_options = {"answer": answer}
    async with host.agent() as agent, agent.connection() as control_plane, trio.open_nursery() as nursery:
        await agent.create(ONE)
        faults = []

        async def call():
            with pytest.raises(Fault) as caught:
                await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "x"}, timeout=60)
            faults.append((caught.value.code, caught.value.message, caught.value.details["status"]))

        for _ in range(34):
            nursery.start_soon(call)
        await wait_all_tasks_blocked()
        refused = []

        def on_step(name):
            if name == "save_state":
                with pytest.raises(Fault) as caught:
                    agent.manager.find(ONE).guest()
                refused.append(caught.value.details)

        host.on_step = on_step
        await agent.pause(ONE)
        await wait_all_tasks_blocked()
        assert refused == [{"status": "pausing"}]
        assert faults.count((FaultCode.INVALID_STATE, "the sandbox was paused", "pausing")) == 32
        assert {fault[0] for fault in faults} == {FaultCode.INVALID_STATE}
        assert len(faults) == 34
        with pytest.raises(Fault, match="the sandbox is paused"):
            agent.manager.find(ONE).guest()


async def test_calls_survive_a_failed_pause(host, autojump_clock):
    """As if nothing had happened."""
    release = trio.Event()

    async def answer(method, body, stream):
        if method == "exec":
            await release.wait()
        return {"exit_code": 7}

    host.guest_options = {"answer": answer}
    answers = []
    async with host.agent() as agent, agent.connection() as control_plane, trio.open_nursery() as nursery:
        await agent.create(ONE)

        async def call():
            answers.append(await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "x"}, timeout=60))

        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        host.vms.fail_next("save_state", "no")
        with pytest.raises(Fault):
            await agent.pause(ONE)
        release.set()
        await wait_all_tasks_blocked()
        assert answers == [{"exit_code": 7}]


async def test_a_vm_that_will_not_die_after_the_commit(host, autojump_clock):
    """Its slot stays its own, the sandbox is paused; the resume ends it first."""
    async with host.agent() as agent:
        await agent.create(ONE)
        machine = host.vms.machine(ONE)
        machine.unkillable = True
        assert (await agent.pause(ONE)).status == "paused"
        assert agent.slots.statistics().in_use == 1
        assert agent.manager.find(ONE).memory_mb() == 0
        with pytest.raises(Fault) as caught:
            await agent.resume(ONE)
        assert caught.value.code == FaultCode.INTERNAL
        assert agent.statuses() == {ONE: "paused"}
        machine.unkillable = False
        assert (await agent.resume(ONE)).status == "running"
        await agent.check()


async def test_death_while_it_pauses(host, autojump_clock):
    """Before the commit it has died, and that is told; after it, it was meant to go."""
    for step, told in (("save_state", True), ("store_rename", True), ("kill", False)):
        async with host.agent() as agent, trio.open_nursery() as nursery:
            await agent.create(ONE)
            machine = host.vms.machine(ONE)

            def on_step(name, step=step, machine=machine):
                if name == step:
                    machine.die("boom")

            outcome = []

            async def pause(agent=agent, outcome=outcome):
                try:
                    outcome.append((await agent.pause(ONE)).status)
                except Fault as fault:
                    outcome.append(fault.code)

            host.on_step = on_step
            nursery.start_soon(pause)
            await wait_all_tasks_blocked()
            host.on_step = lambda name: None
            assert [event for name, event in agent.told() if event == "died"] == (["died"] if told else [])
            assert agent.statuses() == ({} if told else {ONE: "paused"})
            assert outcome == (["invalid_state"] if told else ["paused"]) or outcome[0] == "internal"
            if not told:
                await agent.destroy(ONE)
            for entry in agent.outbox.entries():
                await agent.outbox.acknowledge(entry.sequence)
            agent.manager._ended.clear()
            await agent.check()


RESUME_FAILURES = [
    ("slot", NoFreeSlots("none")),
    ("overlay_create", storage.StorageTimeout("/a/b/c")),
    ("pager_listen", PagerUnavailable("down")),
    ("pager_listen", SnapshotUnreadable("{root}/snapshots/x/mem.header is cut")),
    ("pager_listen", SnapshotNotOpened("{root}/snapshots/x/mem.header: Too many open files")),
    ("open_tap", OSError(errno.EIO, "bad")),
    ("restore", VmCommandFailed("no")),
    ("restored", ValueError("a bug")),
    ("wait", PagingDamaged("{root}/builds/x/data is damaged")),
    ("wait", PagingFailed("the VMM has ended")),
    ("wait", ConnectTimeout("late")),
    ("resume", VmCommandFailed("no")),
    ("guest", None),
    ("fsync", OSError(errno.ENOSPC, "full")),
]


@pytest.mark.parametrize(("step", "error"), RESUME_FAILURES)
async def test_a_failing_resume(host, autojump_clock, monkeypatch, step, error):
    """Whatever fails: undone in reverse, still paused, a fault without the host's paths; the next one succeeds."""
    async with host.agent(guest_timeout=5.0) as agent:
        await agent.create(ONE)
        remember(host, ONE, b"remember")
        await agent.pause(ONE)
        before = agent.manager.find(ONE).made.record.base
        if error is not None and error.args and "{root}" in str(error.args[0]):
            error = type(error)(error.args[0].format(root=host.state.snapshots))
        if step == "wait":
            host.pager.fail_on_wait = error
        if step == "guest":
            host.guest_options = {"boots": False}

        def on_step(name):
            if name == step:
                host.on_step = lambda name: None
                raise error

        async def fail():
            raise error

        host.on_step = on_step
        if step == "slot":
            monkeypatch.setattr(agent.slots, "acquire", fail)
        with pytest.raises(Fault) as caught:
            await agent.resume(ONE)
        damaged = isinstance(error, SnapshotUnreadable | PagingDamaged)
        assert (caught.value.code == FaultCode.SNAPSHOT_DAMAGED) == damaged
        assert str(host.root) not in caught.value.message
        assert damaged or caught.value.retryable or not isinstance(error, PagingFailed)
        assert (caught.value.code == FaultCode.BUSY) == isinstance(error, SnapshotNotOpened)
        if damaged:
            assert "/x/" in caught.value.message
        if step == "slot":
            monkeypatch.delattr(agent.slots, "acquire")
        host.on_step = lambda name: None
        host.guest_options = {}
        assert agent.statuses() == {ONE: "paused"}
        await agent.check()
        assert agent.manager.find(ONE).made.record.base == before
        assert (await agent.resume(ONE)).status == "running"
        await agent.check()


async def test_memory_admission(host, autojump_clock):
    """A paused sandbox takes no memory; its resume is admitted like a create, and says so when there is no room."""
    async with host.agent(memory_mb=600) as agent:
        await agent.create(ONE, memory_mb=300)
        with pytest.raises(Fault, match="do not fit"):
            await agent.create(TWO, memory_mb=300)
        await agent.pause(ONE)
        await agent.create(TWO, memory_mb=300)
        with pytest.raises(Fault) as caught:
            await agent.resume(ONE)
        assert (caught.value.code, caught.value.retryable) == (FaultCode.NO_CAPACITY, True)
        assert agent.statuses()[ONE] == "paused"
        await agent.destroy(TWO)
        host.disk_free_mb = 100
        with pytest.raises(Fault, match="MiB of disk left"):
            await agent.resume(ONE)
        host.disk_free_mb = 10_000
        await agent.resume(ONE)
        await agent.check()
