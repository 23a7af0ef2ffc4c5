"""Snapshots on a host: removed with their template, marked when they are lost, collected when nobody knows them."""

from __future__ import annotations

from uuid import uuid4

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from capsule.db.errors import DatabaseUnavailable
from capsule.model import CreateSnapshot
from capsule.monitor.copies import MAX_AT_ONCE, SNAPSHOT_GRACE
from capsule.monitor.host import INTERVAL


@pytest.fixture
async def template(world, agent, plane):
    """A template of a running sandbox."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    return await plane.templates.create(world.principal, CreateSnapshot(sandbox=row.id, name="mine"), None)


async def lost(world):
    return [row["lost_at"] is not None for row in await world.sql("select lost_at from template_hosts")]


async def test_one_that_the_host_lost(virtual_clock, world, agent, plane, template, follow):
    """It is marked, nothing else; found again, it is as before. The host's word makes no row."""
    await follow()
    kept = dict(agent.snapshots)
    agent.snapshots.clear()
    await trio.sleep(INTERVAL + 1)
    assert await lost(world) == [True]
    assert len((await plane.templates.list(world.principal, "snapshot", 9, None)).items) == 1
    agent.snapshots.update(kept)
    await trio.sleep(INTERVAL + 1)
    assert await lost(world) == [False]


@pytest.mark.parametrize("there", [True, False])
async def test_a_deletion_that_nobody_finished(virtual_clock, world, agent, template, follow, there):
    """Asked again until it is done; one that is gone already is done."""
    await world.sql("update templates set deleted_at = now() where id = $1", template.id)
    if not there:
        agent.snapshots.clear()
    agent.faults["snapshot.remove"] = [Fault(FaultCode.INTERNAL, "busy")] * 2
    await follow()
    await trio.sleep(4 * INTERVAL)
    assert agent.snapshots == {}
    assert await world.sql("select 1 from template_hosts") == []
    assert not there or sum(method == "snapshot.remove" for method, _ in agent.asked) == 3


async def test_the_database_fails_after_the_removal(virtual_clock, world, agent, template, follow):
    """The row goes in the next round."""
    await world.sql("update templates set deleted_at = now() where id = $1", template.id)
    failures = [1, 1]

    class Failing:
        def __getattr__(self, name):
            return getattr(world.db, name)

        async def run(self, fn, *args, **kwargs):
            if fn.__name__ == "forget_copy" and failures:
                failures.pop()
                await trio.lowlevel.checkpoint()
                raise DatabaseUnavailable("away")
            return await world.db.run(fn, *args, **kwargs)

    await follow(Failing())
    await trio.sleep(4 * INTERVAL)
    assert not failures
    assert await world.sql("select 1 from template_hosts") == []


async def test_one_that_nobody_wrote_down(virtual_clock, world, agent, template, follow):
    """Made by a control plane that died before its row: it has the grace, then it goes; one that gets its row in time
    stays, whatever another host has."""
    other = await world.add_host()
    await follow()
    orphan, late = uuid4(), uuid4()
    for one in (orphan, late):
        agent.snapshots[str(one)] = {}
    other.snapshots[str(template.id)] = {}
    await follow(of=other)
    await trio.sleep(SNAPSHOT_GRACE - INTERVAL)
    assert len(agent.snapshots) == 3
    await world.sql(
        """insert into templates (id, team_id, name, type, vcpus, memory_mb)
           values ($1, $2, 'late', 'snapshot', 1, 512)""",
        late,
        world.principal.team_id,
    )
    await world.sql("insert into template_hosts (template_id, host_id) values ($1, $2)", late, agent.host)
    await trio.sleep(3 * INTERVAL)
    assert set(agent.snapshots) == {str(template.id), str(late)}
    assert other.snapshots == {}


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_written_down_while_we_look(virtual_clock, world, agent, follow, moment):
    """A snapshot and its row that come just before or just after the rows are read: it is never taken for lost, nor for
    unknown. (A listing from before the rows would show a row without its snapshot.)"""
    made, marked = [], []

    class Interleaved:
        def __getattr__(self, name):
            return getattr(world.db, name)

        async def run(self, fn, *args, **kwargs):
            if fn.__name__ == "_mark":
                marked.append(args)
            if fn.__name__ != "copies_on":
                return await world.db.run(fn, *args, **kwargs)
            if moment == "before":
                await make()
            rows = await world.db.run(fn, *args, **kwargs)
            if moment == "after":
                await make()
            return rows

    async def make():
        if len(made) < 3:
            made.append(uuid4())
            agent.snapshots[str(made[-1])] = {}
            await world.sql(
                """insert into templates (id, team_id, name, type, vcpus, memory_mb)
                   values ($1, $2, $3, 'snapshot', 1, 512)""",
                made[-1],
                world.principal.team_id,
                f"t{len(made)}",
            )
            await world.sql("insert into template_hosts (template_id, host_id) values ($1, $2)", made[-1], agent.host)

    await follow(Interleaved())
    await trio.sleep(SNAPSHOT_GRACE + 4 * INTERVAL)
    assert set(agent.snapshots) == {str(one) for one in made}
    assert (len(made), marked) == (3, [])


async def test_removals_hold_up_nothing(virtual_clock, world, agent, template, follow, status):
    """A host that invents snapshots and hangs in their removal: rows go on, and only so many are under way."""
    for _ in range(MAX_AT_ONCE + 50):
        agent.snapshots[str(uuid4())] = {}
    agent.hold("snapshot.remove")
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    await follow()
    await trio.sleep(SNAPSHOT_GRACE + 2 * INTERVAL)
    assert 0 < sum(method == "snapshot.remove" for method, _ in agent.asked) <= MAX_AT_ONCE
    agent.die(row.id)
    await status(row.id, "error", 1)
