"""Snapshots of running and of paused sandboxes, sandboxes that start from them, and forks."""

from __future__ import annotations

import errno
from uuid import UUID

import pytest
import trio
from sandbox_world import create_body, request, sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.storage.overlay import HostDiskFull, StorageTimeout
from agent.vmm.driver import VmCommandFailed, VmDiskFull
from agent.wire.calls import HostListing, SnapshotState, parse
from agent.wire.faults import Fault, FaultCode

ONE, TWO, THREE, SNAPSHOT, OTHER = (sandbox_id(number) for number in (1, 2, 3, 100, 101))


def remember(host, name, value, offset=4096):
    host.vms.machine(name).write(offset, value)


def write_disk(host, name, block, value):
    host.overlays.put(host.vms.machine(name).disk, block, value)


def disk_blocks(host, name):
    """What the guest sees on its disk."""
    record, blocks = host.state.load()[name], {}
    layers = host.store().load(UUID(record.base)).layers if record.base else ()
    frozen = [host.state.directory(name) / disk for disk in record.frozen]
    for file in (*layers, *frozen, host.vms.machine(name).disk):
        blocks |= host.overlays.blocks(file)
    return blocks


async def test_over_the_wire(host, autojump_clock):
    """Of a running one, which runs on; listed; the same id again is the same; removed, and gone."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        body = {"snapshot_id": SNAPSHOT, "sandbox_id": ONE}
        state = parse(SnapshotState, await control_plane.call("snapshot.create", body, timeout=60))
        assert (state.template, state.vcpus, state.memory_mb) == ("minimal", 1, 128)
        assert state.stopped_ms > 0
        assert state.size_bytes > 0
        assert agent.statuses() == {ONE: "running"}
        again = parse(SnapshotState, await control_plane.call("snapshot.create", body, timeout=60))
        assert again.snapshot_id == SNAPSHOT
        listing = parse(HostListing, await control_plane.call("host.list", {}, timeout=5))
        assert listing.snapshots == [SNAPSHOT]
        await agent.check()
        create = create_body(TWO, snapshot_id=SNAPSHOT, hostname="two", envs={"X": "y"})
        created = await control_plane.call("sandbox.create", create, timeout=60)
        configured = host.guests[created["host_ip"]].configured
        assert (configured["hostname"], configured["envs"]) == ("two", {"X": "y"})
        assert configured["machine_id"] == TWO.replace("-", "")
        for _ in range(2):
            await control_plane.call("snapshot.remove", {"snapshot_id": SNAPSHOT}, timeout=60)
        await agent.check()
        assert agent.statuses() == {ONE: "running", TWO: "running"}
        with pytest.raises(Fault, match="was removed") as caught:
            await control_plane.call("snapshot.create", body, timeout=60)
        assert caught.value.code == FaultCode.INVALID_STATE
        with pytest.raises(Fault) as caught:
            await control_plane.call("sandbox.create", create_body(THREE, snapshot_id=SNAPSHOT), timeout=60)
        assert (caught.value.code, caught.value.details) == (FaultCode.NOT_FOUND, {"object": "snapshot"})
        await agent.pause(TWO)
        await agent.resume(TWO)
        await agent.check()


@pytest.mark.parametrize("paused", [False, True])
async def test_what_is_in_it(host, autojump_clock, paused):
    """Memory, devices and disk of the moment; what the source does later is its own, and so is what a copy does."""
    async with host.agent() as agent:
        await agent.create(ONE)
        remember(host, ONE, b"before__")
        write_disk(host, ONE, 1, 11)
        host.vms.machine(ONE).tick()
        if paused:
            await agent.pause(ONE)
        await agent.snapshot(SNAPSHOT, ONE)
        await agent.check()
        if paused:
            await agent.resume(ONE)
        remember(host, ONE, b"later___")
        write_disk(host, ONE, 1, 22)
        write_disk(host, ONE, 2, 33)
        await agent.create(TWO, snapshot_id=SNAPSHOT)
        await agent.create(THREE, snapshot_id=SNAPSHOT)
        assert host.memory(SNAPSHOT, 4096) == b"before__"
        assert host.vms.machine(TWO).tick() == 2
        assert disk_blocks(host, ONE) == {1: 22, 2: 33}
        assert disk_blocks(host, TWO) == {1: 11}
        write_disk(host, TWO, 1, 44)
        assert disk_blocks(host, THREE) == {1: 11}
        await agent.pause(ONE)
        base = agent.manager.find(ONE).made.record.base
        assert host.memory(base, 4096) == b"later___"
        await agent.resume(ONE)
        assert disk_blocks(host, ONE) == {1: 22, 2: 33}
        await agent.check()
        for name in (ONE, TWO, THREE):
            await agent.destroy(name)
        await agent.check()
        assert [str(one.id) for one in host.store().list()] == [SNAPSHOT]


async def test_many_checkpoints(host, autojump_clock):
    """Of a restored one: each is a difference to the one before; the pager's snapshot stays until the VM goes."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.pause(ONE)
        await agent.resume(ONE)
        origin = agent.manager.find(ONE).made.record.origin
        for number in range(4):
            remember(host, ONE, b"value %d " % number, 4096 * (number + 1))
            write_disk(host, ONE, number, number + 1)
            await agent.snapshot(sandbox_id(200 + number), ONE)
            await agent.check()
            assert agent.manager.find(ONE).made.record.origin == origin
            assert host.pager.vms[ONE].vm.snapshot == host.store().snapshot_directory(UUID(origin))
        for number in range(4):
            name = sandbox_id(200 + number)
            for other in range(4):
                wanted = b"value %d " % other if other <= number else bytes(8)
                assert host.memory(name, 4096 * (other + 1)) == wanted
        await agent.pause(ONE)
        assert str(origin) not in {str(one.id) for one in host.store().list()}
        await agent.resume(ONE)
        assert disk_blocks(host, ONE) == {number: number + 1 for number in range(4)}
        await agent.check()


async def test_a_fork_keeps_its_environment(host, autojump_clock):
    """`keep_envs`: the guest has the defaults of its source, nothing is sent."""
    async with host.agent() as agent:
        await agent.create(ONE, envs={"A": "b"})
        await agent.snapshot(SNAPSHOT, ONE)
        state = await agent.create(TWO, snapshot_id=SNAPSHOT, keep_envs=True, envs={"C": "d"})
        assert "envs" not in host.guests[state.host_ip].configured


async def test_calls_outlive_a_checkpoint(host, autojump_clock):
    """The guest stands still for a moment, that is all; its processes go on at once."""
    release = trio.Event()
    answers = []

    async with host.agent() as agent, agent.connection() as control_plane, trio.open_nursery() as nursery:
        await agent.create(ONE)
        guest = agent.manager.find(ONE).guest()
        original = guest._answer

        async def answer(method, body, stream):
            if method == "exec":
                await release.wait()
                return {"exit_code": 3}
            return await original(method, body, stream)

        guest._answer = answer
        guest.hang_up()
        await trio.sleep(1)

        async def call():
            answers.append(await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "x"}, timeout=60))

        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        await agent.snapshot(SNAPSHOT, ONE)
        release.set()
        await wait_all_tasks_blocked()
        assert answers == [{"exit_code": 3}]
        assert not host.frozen_guests


@pytest.mark.parametrize(("changes", "word"), [({"vcpus": 2}, "1 vCPUs"), ({"memory_mb": 256}, "128 MiB")])
async def test_another_shape(host, autojump_clock, changes, word):
    """Shape is baked in."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.snapshot(SNAPSHOT, ONE)
        with pytest.raises(Fault, match=word) as caught:
            await agent.create(TWO, snapshot_id=SNAPSHOT, **changes)
        assert caught.value.code == FaultCode.INVALID_ARGUMENT
        await agent.check()


CHECKPOINT_FAILURES = [
    ("fsync", OSError(errno.ENOSPC, "full"), FaultCode.DISK_FULL),
    ("overlay_create", StorageTimeout("slow"), FaultCode.INTERNAL),
    ("store_make_directory", OSError(errno.ENOSPC, "full"), FaultCode.DISK_FULL),
    ("pause", VmCommandFailed("no"), FaultCode.INTERNAL),
    ("pivot", VmCommandFailed("no"), FaultCode.INTERNAL),
    ("pivoted", VmCommandFailed("too late"), FaultCode.INTERNAL),
    ("save_state", VmDiskFull("full"), FaultCode.DISK_FULL),
    ("saved_state", VmDiskFull("full"), FaultCode.DISK_FULL),
    ("resumed", ValueError("a bug"), FaultCode.INTERNAL),
    ("guest_thaw", Fault("internal", "no"), None),
    ("store_create", OSError(errno.ENOSPC, "full"), FaultCode.DISK_FULL),
    ("overlay_freeze", HostDiskFull("full"), FaultCode.DISK_FULL),
    ("store_rename", OSError(errno.EIO, "bad"), FaultCode.INTERNAL),
]


@pytest.mark.parametrize(("step", "error", "code"), CHECKPOINT_FAILURES)
@pytest.mark.parametrize("restored", [False, True])
async def test_a_failing_checkpoint(host, autojump_clock, step, error, code, restored):
    """At any step: the source runs on and nothing is lost: what was dirty before is in its next generation."""
    async with host.agent() as agent:
        await agent.create(ONE)
        remember(host, ONE, b"first___")
        write_disk(host, ONE, 1, 1)
        if restored:
            await agent.pause(ONE)
            await agent.resume(ONE)
        remember(host, ONE, b"second__", 8192)
        write_disk(host, ONE, 2, 2)

        def on_step(name):
            if name == step:
                host.on_step = lambda name: None
                raise error

        host.on_step = on_step
        if code is None:
            await agent.snapshot(SNAPSHOT, ONE)
            host.frozen_guests.clear()  # it thaws by itself
        else:
            with pytest.raises(Fault) as caught:
                await agent.snapshot(SNAPSHOT, ONE)
            assert caught.value.code == code
            assert agent.manager.named.ids() == []
        assert agent.statuses() == {ONE: "running"}
        await agent.check()
        remember(host, ONE, b"third___", 3 * 4096)
        write_disk(host, ONE, 3, 3)
        assert disk_blocks(host, ONE) == {1: 1, 2: 2, 3: 3}
        await agent.snapshot(OTHER, ONE)
        await agent.check()
        await agent.pause(ONE)
        for name in (OTHER, agent.manager.find(ONE).made.record.base):
            wanted = [b"first___", b"second__", b"third___"]
            assert [host.memory(name, 4096 * (number + 1)) for number in range(3)] == wanted
        await agent.resume(ONE)
        assert disk_blocks(host, ONE) == {1: 1, 2: 2, 3: 3}
        await agent.check()


async def test_destroy_beside_everything(host, autojump_clock):
    """Destroy wins at every step of a pause, a resume and a checkpoint; the other one gets invalid_state, or was
    quicker; nothing is left, and no slot is given back twice (trap 6)."""
    for kind in ("pause", "resume", "checkpoint", "copy"):
        for point in range(1, 500):
            async with host.agent() as agent, trio.open_nursery() as nursery:
                await agent.create(ONE)
                if kind in {"resume", "copy"}:
                    await agent.pause(ONE)
                await wait_all_tasks_blocked()
                seen, outcome = [], []

                def on_step(name, seen=seen, point=point, nursery=nursery, agent=agent):
                    seen.append(name)
                    if len(seen) == point:
                        nursery.start_soon(agent.destroy, ONE)

                async def act(agent=agent, outcome=outcome, kind=kind):
                    actions = {"pause": agent.pause, "resume": agent.resume}
                    try:
                        await actions[kind](ONE) if kind in actions else await agent.snapshot(SNAPSHOT, ONE)
                        outcome.append("done")
                    except Fault as fault:
                        outcome.append(fault.code)

                host.on_step = on_step
                nursery.start_soon(act)
                await wait_all_tasks_blocked()
                host.on_step = lambda name: None
                reached = len(seen) >= point
                if reached:
                    assert agent.statuses() == {}, f"{kind} at {point} ({seen[point - 1]})"
                    assert outcome in (["done"], ["invalid_state"])
                else:
                    await agent.destroy(ONE)
                await agent.manager.named.remove(SNAPSHOT)
                await agent.check()
                assert host.store().list() == []
                assert not agent.outbox.entries()
            if not reached:
                break
        assert point > 5, kind


async def test_a_snapshot_removed_while_it_is_made(host, autojump_clock):
    """It does not come back."""
    async with host.agent() as agent, trio.open_nursery() as nursery:
        await agent.create(ONE)
        seen = []

        def on_step(name):
            seen.append(name)
            if name == "save_state":
                nursery.start_soon(agent.manager.named.remove, SNAPSHOT)

        host.on_step = on_step
        with pytest.raises(Fault, match="was removed"):
            await agent.snapshot(SNAPSHOT, ONE)
        host.on_step = lambda name: None
        await agent.check()
        assert agent.manager.named.ids() == []


@pytest.mark.parametrize("looked", [False, True])
async def test_a_snapshot_removed_while_it_is_told_of(host, autojump_clock, monkeypatch, looked):
    """Asked for again, and taken back before the answer: nobody is told that it is there."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.snapshot(SNAPSHOT, ONE)
        named, begun, gate = agent.manager.named, trio.Event(), trio.Event()
        describe = named.describe

        async def slow(snapshot_id):
            found = await describe(snapshot_id) if looked else None
            begun.set()
            await gate.wait()
            return found or await describe(snapshot_id)

        monkeypatch.setattr(named, "describe", slow)
        faults = []

        async def again():
            with pytest.raises(Fault) as caught:
                await agent.snapshot(SNAPSHOT, ONE)
            faults.append(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(again)
            await begun.wait()
            await named.remove(SNAPSHOT)
            gate.set()
        (fault,) = faults
        assert (fault.code, fault.details) == (FaultCode.INVALID_STATE, {"object": "snapshot"})
        await agent.check()


async def test_one_id_asked_for_twice_at_once(host, autojump_clock, monkeypatch):
    """One snapshot, two answers; a client that hangs up changes nothing, and takes no place for ever."""
    async with host.agent() as agent:
        await agent.create(ONE)
        states = []

        async def ask():
            states.append(await agent.snapshot(SNAPSHOT, ONE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
        assert states[0] == states[1]
        with trio.move_on_after(0):
            await agent.snapshot(OTHER, ONE)
        with trio.CancelScope() as scope:

            def on_step(name):
                if name == "save_state":
                    scope.cancel()

            host.on_step = on_step
            await agent.snapshot(OTHER, ONE)
        await wait_all_tasks_blocked()
        assert agent.manager.named.ids() == [SNAPSHOT, OTHER]
        await agent.check()
        monkeypatch.setattr("agent.sandboxes.named.MAX_NAMED", 3)  # nobody came back for the other's answer
        await agent.snapshot(sandbox_id(102), ONE)


async def test_sandboxes_of_a_failed_start_leave_nothing(host, autojump_clock):
    """Every step of a start from a snapshot may fail: a fault, nothing left, the snapshot untouched."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.snapshot(SNAPSHOT, ONE)
        steps = (
            "fsync",
            "store_link",
            "store_rename",
            "overlay_create",
            "pager_listen",
            "restore",
            "resume",
        )
        for step in steps:

            def on_step(name, step=step):
                if name == step:
                    host.on_step = lambda name: None
                    raise OSError(errno.EIO, "bad")

            host.on_step = on_step
            with pytest.raises(Fault) as caught:
                await agent.create(TWO, snapshot_id=SNAPSHOT)
            assert caught.value.code == FaultCode.INTERNAL
            host.on_step = lambda name: None
            await agent.check()
        await agent.create(TWO, snapshot_id=SNAPSHOT)
        assert request(TWO).sandbox_id == TWO
        await agent.check()


@pytest.mark.parametrize("limit", ["count", "disk"])
async def test_templates_leave_room(host, monkeypatch, autojump_clock, limit):
    """A host that is nearly full, or has very many snapshots, makes no more of them; one that it has is still told."""
    async with host.agent() as agent:
        await agent.create(ONE)
        made = await agent.snapshot(SNAPSHOT, ONE)
        if limit == "count":
            monkeypatch.setattr("agent.sandboxes.named.MAX_NAMED", 1)
        else:
            monkeypatch.setattr("agent.sandboxes.admission.DISK_RESERVE_MB", 2**40)
        with pytest.raises(Fault) as refused:
            await agent.snapshot(OTHER, ONE)
        assert refused.value.code == FaultCode.NO_CAPACITY
        assert (await agent.snapshot(SNAPSHOT, ONE)).snapshot_id == made.snapshot_id


async def test_a_disk_that_grew_too_deep(host, monkeypatch, autojump_clock):
    """Checkpoints stop before QEMU could not open the disk any more; a pause and a resume make it shallow again."""
    monkeypatch.setattr("agent.sandboxes.checkpoint.DEEPEST_DISK", 3)
    monkeypatch.setattr("agent.sandboxes.compaction.DEEPEST_DISK", 3)
    monkeypatch.setattr("agent.sandboxes.pausing.MAX_LAYERS", 2)
    async with host.agent() as agent:
        await agent.create(ONE)
        write_disk(host, ONE, 1, 7)
        for number in range(3):
            await agent.snapshot(sandbox_id(200 + number), ONE)
        with pytest.raises(Fault, match="pause and resume") as refused:
            await agent.snapshot(OTHER, ONE)
        assert refused.value.code == FaultCode.CONFLICT
        assert agent.statuses() == {ONE: "running"}
        pause, resume = agent.manager.find(ONE).pause(), agent.manager.find(ONE).resume()
        await pause.wait()
        await resume.wait()
        assert len(host.store().load(UUID(host.state.load()[ONE].base)).layers) <= 3
        assert disk_blocks(host, ONE)[1] == 7
        await agent.snapshot(OTHER, ONE)
        await agent.check()
