"""What the monitor makes of pauses: those that hosts do by themselves, those that nobody finishes, and what rests."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from capsule.monitor.host import INTERVAL, RESTING_GRACE, STRANGER_GRACE


async def trail(world):
    rows = await world.sql(
        "select action, status, actor_type, metadata from audit_logs where resource_type = 'sandbox'"
    )
    return [tuple(row) for row in rows]


IDLE = ("pause", "info", "system", {"reason": "idle for 60 s"})


async def test_an_auto_pause_reaches_its_row_at_once(virtual_clock, world, agent, follow, status):
    """Within a second, through the watch; with the reason, in the trail once, acknowledged."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    await follow()
    assert await agent.auto_pause(row.id)
    after = await status(row.id, "paused", 1)
    assert (after.reason, after.host_ip, after.generation) == ("idle for 60 s", None, row.generation + 2)
    await trio.sleep(1)
    assert agent.outbox == []
    assert await trail(world) == [IDLE]


async def test_an_entry_is_kept_until_it_is_in_the_row(virtual_clock, world, agent, follow, status):
    """Trap 8: reading the list does not empty it. The reader dies after it has read; the next one reads the same."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    assert await agent.auto_pause(row.id)
    read = trio.Event()

    class Dies:
        def __getattr__(self, name):
            return getattr(world.db, name)

        async def transaction(self, fn, *args, **kwargs):
            if fn.__name__ != "_change":
                return await world.db.transaction(fn, *args, **kwargs)
            read.set()
            return await trio.sleep_forever()

    reader = await follow(Dies())
    await read.wait()
    await trio.sleep(INTERVAL)
    reader.cancel()
    assert len(agent.outbox) == 1
    await follow()
    assert (await status(row.id, "paused", 1)).reason == "idle for 60 s"
    await trio.sleep(1)
    assert agent.outbox == []
    assert await trail(world) == [IDLE]


async def test_an_entry_that_is_read_twice(virtual_clock, world, agent, follow, status):
    """Two readers, and an acknowledgement that is lost: one pause, one line in the trail. Resumed in between, it is not
    paused by the old entry."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    gate = agent.hold("host.acknowledge")
    await follow()
    await follow()
    assert await agent.auto_pause(row.id)
    paused = await status(row.id, "paused", 1)
    await agent._resume(str(row.id))
    for step, deadline in (("resuming", world.now() + timedelta(hours=1)), ("running", None)):
        await world.sql(
            "update sandboxes set status = $2, generation = generation + 1, transition_deadline = $3 where id = $1",
            row.id,
            step,
            deadline,
        )
    await trio.sleep(2 * INTERVAL)
    assert len(agent.outbox) == 1
    gate.set()
    await trio.sleep(3 * INTERVAL)
    assert agent.outbox == []
    after = await world.row(row.id)
    assert (after.status, after.generation) == ("running", paused.generation + 2)
    assert await trail(world) == [IDLE]


async def test_an_auto_pause_that_failed(virtual_clock, world, agent, follow):
    """It runs on, and the entry goes."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    await follow()
    agent.disk_full = True
    assert not await agent.auto_pause(row.id)
    await trio.sleep(2)
    assert await world.row(row.id) == row
    assert agent.outbox == []


async def test_auto_paused_before_its_maker_heard_that_it_runs(virtual_clock, world, agent, follow, status):
    """`starting`, and on the host it rests already: it has run, then it was paused."""
    row = await world.insert(agent, "starting")
    agent.add_vm(row.id)
    assert await agent.auto_pause(row.id)
    await follow()
    after = await status(row.id, "paused", 2)
    assert after.started_at is not None
    await trio.sleep(1)
    assert agent.outbox == []


@pytest.mark.parametrize("host_has", ["running", "paused", "nothing"])
@pytest.mark.parametrize("on_its_way", ["pausing", "resuming"])
async def test_rows_that_nobody_finishes(virtual_clock, world, agent, follow, status, on_its_way, host_has):
    """Trap 22: a row on its way to or from rest whose control plane died: nobody touches it before its time, then it
    becomes what the host shows."""
    row = await world.insert(agent, on_its_way, deadline=timedelta(seconds=20))
    if host_has != "nothing":
        (agent.add_vm if host_has == "running" else agent.add_paused)(row.id)
    await follow()
    await trio.sleep(15)
    assert (await world.row(row.id)).status == on_its_way
    wanted = "missing" if host_has == "nothing" else host_has
    after = await status(row.id, wanted, 2 * INTERVAL)
    assert (after.reason is None) == ((on_its_way, host_has) == ("resuming", "running"))
    assert len(await trail(world)) == ((on_its_way, host_has) in {("pausing", "paused"), ("resuming", "running")})


@pytest.mark.parametrize("on_its_way", ["pausing", "resuming"])
async def test_a_death_on_the_way(virtual_clock, world, agent, follow, status, on_its_way):
    """Told by the host: at once, whatever its deadline."""
    row = await world.insert(agent, on_its_way)
    agent.add_vm(row.id, on_its_way)
    await follow()
    agent.die(row.id, "qemu was killed")
    assert (await status(row.id, "error", 1)).reason == "qemu was killed"


async def test_what_rests_and_what_does_not(virtual_clock, world, agent, follow, status):
    """Absent from the live list, a paused row stays; one that the host runs is made to run; one that it does not have
    is `missing`, until it has it again: of which the trail says nothing."""
    rests, runs, gone = [await world.insert(agent, "paused") for _ in range(3)]
    agent.add_paused(rests.id)
    agent.add_vm(runs.id)
    await follow()
    assert (await status(runs.id, "running", 1)).host_ip == "10.11.0.1"
    assert (await status(gone.id, "missing", 1)).reason == "its host does not find its snapshot"
    await trio.sleep(RESTING_GRACE + 3 * INTERVAL)
    assert await world.row(rests.id) == rests
    assert (await world.row(gone.id)).status == "missing"
    agent.add_paused(gone.id)
    assert (await status(gone.id, "paused", 1)).reason == "its host has its snapshot again"
    await trio.sleep(RESTING_GRACE)
    assert set(agent.paused) == {str(rests.id), str(gone.id)}
    assert [action for action, *_ in await trail(world)] == ["resume"]


async def test_told_that_it_rests_and_not_found(virtual_clock, world, agent, follow, status):
    """The entry is believed before the absence: `missing`, as for all that rest, also after a time away."""
    running, away = await world.insert(agent, "running"), await world.insert(agent, "missing")
    for row in (running, away):
        agent.add_vm(row.id)
        assert await agent.auto_pause(row.id)
    kept = dict(agent.paused)
    agent.paused.clear()
    await follow()
    for row in (running, away):
        assert (await status(row.id, "missing", 2 * INTERVAL)).host_ip is None
    await trio.sleep(2 * INTERVAL)
    agent.paused.update(kept)
    agent.changed()
    for row in (running, away):
        await status(row.id, "paused", 1)


async def test_paused_while_its_host_was_away(virtual_clock, world, agent, follow, status):
    """`missing` becomes `paused`, with the reason that the host kept."""
    row, untold = [await world.insert(agent, "missing") for _ in range(2)]
    agent.add_vm(row.id)
    assert await agent.auto_pause(row.id, "no control plane")
    agent.add_paused(untold.id)
    await follow()
    assert (await status(row.id, "paused", 1)).reason == "no control plane"
    assert (await status(untold.id, "paused", 1)).reason == "its host paused it"


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_one_paused_or_resumed_while_we_look(virtual_clock, world, agent, plane, follow, moment):
    """Trap 10, for those at rest: rows first, then the list; a list from before the rows would show a sandbox that was
    just resumed as resting, and one that was just paused as gone."""
    resumed, paused = await world.insert(agent, "paused"), await world.insert(agent, "running")
    agent.add_paused(resumed.id)
    agent.add_vm(paused.id)
    acted = []

    class Interleaved:
        def __getattr__(self, name):
            return getattr(world.db, name)

        async def run(self, fn, *args, **kwargs):
            if fn.__name__ != "on_host":
                return await world.db.run(fn, *args, **kwargs)
            if moment == "before":
                await act()
            rows = await world.db.run(fn, *args, **kwargs)
            if moment == "after":
                await act()
            return rows

    async def act():
        if len(acted) < 6:
            acted.append(1)
            back = len(acted) % 2 == 0
            verbs = (plane.sandboxes.pause, plane.sandboxes.resume)
            await verbs[not back](world.principal, resumed.id)
            await verbs[back](world.principal, paused.id)

    await follow(Interleaved())
    await trio.sleep(10 * INTERVAL)
    assert len(acted) == 6
    assert {(row["action"], row["actor_type"]) for row in await world.sql("select * from audit_logs")} == {
        ("pause", "api_key"),
        ("resume", "api_key"),
    }
    assert await world.disagreements() == []


async def test_strangers_at_rest(virtual_clock, world, agent, follow):
    """One whose row was stopped goes at once; one that never ran has a long grace. One without a row, or whose row
    failed after it had run, stays: nothing of it is anywhere else."""
    stopped, unborn = await world.insert(agent, "stopped"), await world.insert(agent, "error")
    failed, unknown = await world.insert(agent, "running"), uuid4()
    await world.sql("update sandboxes set status = 'error', generation = 4, host_ip = null where id = $1", failed.id)
    for one in (stopped.id, unborn.id, failed.id, unknown):
        agent.add_paused(one)
    await follow()
    await trio.sleep(2 * STRANGER_GRACE)
    assert set(agent.paused) == {str(one) for one in (unborn.id, failed.id, unknown)}
    await trio.sleep(2 * RESTING_GRACE)
    assert set(agent.paused) == {str(failed.id), str(unknown)}


async def test_those_that_stay_hide_nobody(virtual_clock, world, agent, follow, monkeypatch):
    """However many strangers rest on a host: one that lives there, and one that a user ended, still go."""
    monkeypatch.setattr("capsule.monitor.host.MAX_AT_ONCE", 3)
    for _ in range(6):
        agent.add_paused(uuid4())
    await follow()
    await trio.sleep(3 * INTERVAL)
    stopped, stray = await world.insert(agent, "stopped"), uuid4()
    agent.add_paused(stopped.id)
    agent.add_vm(stray)
    await trio.sleep(STRANGER_GRACE + 6 * INTERVAL)
    assert agent.vms == {}
    assert len(agent.paused) == 6


async def test_a_destroy_of_one_at_rest_that_nobody_finished(virtual_clock, world, agent, follow, status):
    """It is still there: not `stopped` before it is gone."""
    row = await world.insert(agent, "stopping", deadline=timedelta(seconds=20))
    agent.add_paused(row.id)
    await follow()
    await trio.sleep(15)
    assert (await world.row(row.id)).status == "stopping"
    agent.faults["sandbox.destroy"] = [Fault(FaultCode.INTERNAL, "busy")]
    await status(row.id, "stopped", 4 * INTERVAL)
    assert agent.paused == {}
