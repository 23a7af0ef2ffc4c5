"""A host is closed while somebody has it in mind for a sandbox: once it is, nothing new comes there, or wakes."""

from __future__ import annotations

from functools import partial

import pytest

from capsule import errors
from capsule.scheduler.scheduler import Scheduler


@pytest.fixture
def after_the_look(monkeypatch):
    """Has `work(host)` done when a place on a host was found first, before it is taken."""
    obtain = Scheduler._obtain

    def do(work):
        done = []

        async def obtained(self, reservation):
            host = await obtain(self, reservation)
            if not done:
                done.append(host)
                await work(host)
            return host

        monkeypatch.setattr(Scheduler, "_obtain", obtained)
        return done

    return do


@pytest.fixture
def close(plane, operator, fleet_of):
    """Closes a host one way or the other."""
    fleet = fleet_of(plane)
    ways = {"cordon": fleet.cordon, "drain": fleet.drain}
    return lambda way, host: ways[way](operator, host)


@pytest.mark.parametrize("way", ["cordon", "drain"])
@pytest.mark.parametrize("others", [0, 1])
async def test_beside_a_create(virtual_clock, world, agent, plane, close, request_body, after_the_look, way, others):
    """It goes to another host, or is told that there is none."""
    for _ in range(others):
        await world.add_host()
    chosen = after_the_look(partial(close, way))
    if others:
        view = await plane.sandboxes.create(world.principal, request_body, None)
        assert view.host_id not in chosen
    else:
        with pytest.raises(errors.NoHostsAvailable):
            await plane.sandboxes.create(world.principal, request_body, None)
        assert not await world.rows()
    assert len(chosen) == 1
    assert await world.disagreements() == []


async def test_behind_a_create(virtual_clock, world, agent, plane, close, request_body, overtake, queued):
    """One that has its place by then comes first: whoever closed the host sees it there."""
    seen = []

    async def cordon():
        await close("cordon", agent.host)
        seen.extend(await world.rows())

    overtaking = overtake(partial(queued, world.db, cordon), before="insert into sandboxes")
    view = await plane.sandboxes.create(world.principal, request_body, None)
    assert overtaking.done
    await queued.done()
    assert seen == [view.id]


async def test_beside_a_create_that_moves(virtual_clock, world, agent, plane, close, request_body, after_the_look):
    """Its first host refused it, the next is closed: it is where it was, and is told."""
    other = await world.add_host()
    agent.memory_mb = other.memory_mb = 0
    moves = []

    async def later(host):
        after_the_look(partial(close, "cordon"))
        moves.append(host)

    after_the_look(later)
    with pytest.raises((errors.NoHostsAvailable, errors.HostUnavailable)):
        await plane.sandboxes.create(world.principal, request_body, None)
    [row] = (await world.rows()).values()
    assert [row.host_id] == moves


async def test_a_drain_beside_a_resume(virtual_clock, world, agent, plane, close, after_the_look):
    """It rests on, and who asked hears that its host is away."""
    row = await world.insert(agent, "paused")
    agent.add_paused(row.id)
    chosen = after_the_look(partial(close, "drain"))
    with pytest.raises(errors.HostUnavailable):
        await plane.sandboxes.resume(world.principal, row.id)
    assert chosen
    assert (await world.row(row.id)).status == "paused"


async def test_beside_a_fork(virtual_clock, world, agent, plane, close, request_body, after_the_look):
    """No child, and no snapshot is left."""
    source = await plane.sandboxes.create(world.principal, request_body, None)
    chosen = after_the_look(partial(close, "cordon"))
    with pytest.raises(errors.NoHostsAvailable):
        await plane.sandboxes.fork(world.principal, source.id, 2, None)
    assert chosen
    assert list(await world.rows()) == [source.id]
    assert agent.snapshots == {}
