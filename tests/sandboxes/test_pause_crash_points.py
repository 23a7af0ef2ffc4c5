"""The agent is killed between any two steps of everything that touches a snapshot; the next one finds the sandbox
exactly as before or exactly as after, and nothing left over."""

from __future__ import annotations

from uuid import UUID

import pytest
from sandbox_world import sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.sandboxes import pausing

ONE, TWO, SNAPSHOT = sandbox_id(1), sandbox_id(2), sandbox_id(100)
FIRST, SECOND = b"first___", b"second__"


def touch(host, number, value):
    """The guest changes its memory, its disk and its devices' state."""
    machine = host.vms.machine(ONE)
    machine.write(4096 * number, value)
    host.overlays.put(machine.disk, number, number)
    machine.tick()


async def booted(agent):
    await agent.create(ONE)
    touch(agent.host, 1, FIRST)


async def restored(agent):
    await booted(agent)
    await agent.pause(ONE)
    await agent.resume(ONE)
    touch(agent.host, 2, SECOND)


async def checkpointed(agent):
    await booted(agent)
    await agent.snapshot(sandbox_id(101), ONE)
    await agent.manager.named.remove(sandbox_id(101))
    touch(agent.host, 2, SECOND)


async def resting(agent):
    await restored(agent)
    await agent.pause(ONE)


async def frozen(agent):
    await restored(agent)
    await agent.snapshot(SNAPSHOT, ONE)


async def pause(agent):
    await agent.pause(ONE)


async def resume(agent):
    await agent.resume(ONE)


async def snapshot(agent):
    await agent.snapshot(SNAPSHOT, ONE)


async def start(agent):
    await agent.create(TWO, snapshot_id=SNAPSHOT)


async def destroy(agent):
    await agent.destroy(ONE)


async def remove(agent):
    await agent.manager.named.remove(SNAPSHOT)


async def settle(agent):
    await wait_all_tasks_blocked()


CASES = [
    (booted, pause),
    (restored, pause),
    (checkpointed, pause),
    (resting, resume),
    (booted, snapshot),
    (restored, snapshot),
    (checkpointed, snapshot),
    (resting, snapshot),
    (frozen, start),
    (resting, destroy),
    (restored, destroy),
    (frozen, remove),
]


def disk_blocks(host, record):
    blocks = {}
    store, directory = host.store(), host.state.directory(record.sandbox_id)
    layers = store.load(UUID(record.base)).layers if record.base else ()
    own = [host.vms.machine(record.sandbox_id).disk] if record.phase == "running" else []
    for file in (*layers, *(directory / name for name in record.frozen), *own):
        blocks |= host.overlays.blocks(file)
    return blocks


async def verify(agent, second):
    """What the guest has written is there, whatever it rests or runs as; and everything can be used and removed."""
    host = agent.host
    await agent.check()
    assert not agent.told(), "nothing has died"
    numbers = {1: FIRST, **({2: SECOND} if second else {})}
    if ONE in agent.statuses():
        await agent.resume(ONE)
        machine = host.vms.machine(ONE)
        assert machine.tick() == len(numbers) + 1, "the state of its devices"
        assert disk_blocks(host, host.state.load()[ONE]) == {number: number for number in numbers}
        touch(host, 3, b"third___")
        await agent.pause(ONE)
        base = agent.manager.find(ONE).made.record.base
        for number, value in {**numbers, 3: b"third___"}.items():
            assert host.memory(base, 4096 * number) == value
        await agent.check()
    if SNAPSHOT in agent.manager.named.ids():
        assert {number: host.memory(SNAPSHOT, 4096 * number) for number in numbers} == numbers
    else:
        await agent.snapshot(SNAPSHOT, ONE) if ONE in agent.statuses() else None
    if SNAPSHOT in agent.manager.named.ids():
        await agent.create(TWO, snapshot_id=SNAPSHOT)
    for name in agent.statuses():
        await agent.destroy(name)
    await agent.manager.named.remove(SNAPSHOT)
    await agent.check()
    assert host.store().list() == []
    assert host.running() == set()


@pytest.mark.parametrize(("before", "act"), CASES, ids=lambda one: one.__name__)
async def test_killed_at_every_step(make_host, autojump_clock, before, act):
    """Each step is the last one once."""
    for point in range(1, 1000):
        host = make_host()
        assert (await host.live(before)).finished
        killed = await host.live(act, crash_at=point)
        host.pager.forget_dead()
        last = await host.live(lambda agent: verify(agent, second=before is not booted))
        assert last.finished, f"killed at {point}"
        if killed.finished:
            break
    assert point > 3


@pytest.mark.parametrize(("before", "act"), [CASES[1], CASES[3], CASES[5], CASES[8]], ids=lambda one: one.__name__)
async def test_killed_again_while_taking_over(make_host, autojump_clock, before, act):
    """A second death, of the agent that takes over, at each of its steps (for every seventh first one)."""
    for point in range(3, 1000, 7):
        for again in range(1, 1000, 2):
            host = make_host()
            await host.live(before)
            first = await host.live(act, crash_at=point)
            host.pager.forget_dead()
            second = await host.live(settle, crash_at=again)
            host.pager.forget_dead()
            last = await host.live(lambda agent: verify(agent, second=before is not booted))
            assert last.finished, f"killed at {point} and {again}"
            if second.finished:
                break
        if first.finished:
            break


@pytest.mark.parametrize(("before", "act"), [CASES[1], CASES[3], CASES[5], CASES[8]], ids=lambda one: one.__name__)
async def test_stopped_at_every_step(make_host, autojump_clock, before, act):
    """SIGTERM is a cancellation: what had been begun is undone at once or by the next agent; no VM is left standing."""
    for point in range(1, 1000):
        host = make_host()
        await host.live(before)
        stopped = await host.live(act, stop_at=point)
        if act is not resume and ONE in host.running():
            assert not host.vms.machine(ONE).paused or host.state.load()[ONE].phase == "paused"
        host.pager.forget_dead()
        last = await host.live(lambda agent: verify(agent, second=before is not booted))
        assert last.finished, f"stopped at {point}"
        if stopped.finished:
            break
    assert point > 3


async def scattered(agent):
    """Paused so often that it is due for compaction."""
    await booted(agent)
    await agent.pause(ONE)
    for _ in range(2):
        await agent.resume(ONE)
        touch(agent.host, 2, SECOND)
        await agent.pause(ONE)


async def test_compaction_killed_at_every_step(make_host, autojump_clock, monkeypatch):
    """It rests as before or as one build and one layer."""
    monkeypatch.setattr(pausing, "MAX_LAYERS", 2)
    for point in range(1, 1000):
        host = make_host()
        compactions = []
        host.overlays.on_merge = lambda compactions=compactions: compactions.append(1)
        assert (await host.live(scattered, crash_at=None)).finished
        killed = await host.live(settle, crash_at=point)
        last = await host.live(verify_compacted)
        assert last.finished, f"killed at {point}"
        if killed.finished:
            break


async def verify_compacted(agent):
    host = agent.host
    await agent.check()
    await wait_all_tasks_blocked()
    base = agent.manager.find(ONE).made.record.base
    assert len(host.store().load(UUID(base)).layers) == 1
    assert len(host.store().load(UUID(base)).header.builds()) == 1
    assert host.memory(base, 4096) == FIRST
    assert host.memory(base, 8192) == SECOND
    await agent.resume(ONE)
    assert host.vms.machine(ONE).tick() == 4
    assert disk_blocks(host, host.state.load()[ONE]) == {1: 1, 2: 2}
    await agent.check()
