"""A host is deleted while somebody makes, wakes or deletes something there: one comes first, and nothing is left that
is neither. The order is made by holding the lock on the host's row that both want."""

from __future__ import annotations

from uuid import uuid4

import pytest
import trio

from capsule import errors


async def alive(world, host):
    [row] = await world.sql("select deleted_at, cordoned from hosts where id = $1", host)
    return row["deleted_at"] is None


def outcome(outcomes, name, work):
    """Runs it and keeps what came of it."""

    async def run():
        try:
            outcomes[name] = await work()
        except errors.CapsuleError as err:
            outcomes[name] = err

    return run


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("first", ["create", "delete"])
async def test_beside_a_create(
    virtual_clock, world, agent, beats, operator, fleet_of, host_lock, request_body, eventually, first, force
):
    """The create first: refused, or forced it ends too. The delete first: there is no host for the new one."""
    plane = await world.control_plane(monitor=True)
    outcomes = {}
    create = outcome(outcomes, "create", lambda: plane.sandboxes.create(world.principal, request_body, None))
    delete = outcome(outcomes, "delete", lambda: fleet_of(plane).delete(operator, agent.host, force=force))
    async with host_lock(world, agent.host) as lock:
        for one in (create, delete) if first == "create" else (delete, create):
            await lock.queue(one)
    if first == "delete":
        assert outcomes["delete"] is None
        assert isinstance(outcomes["create"], errors.NoHostsAvailable)
        assert not await world.rows()
    elif force:
        assert outcomes["delete"] is None
        [row] = (await world.rows()).values()
        assert row.status in {"stopped", "error"}
        assert not agent.vms
    else:
        [row] = (await world.rows()).values()
        assert outcomes["delete"].extra["sandbox_ids"] == [f"sb-{row.id}"]
        assert outcomes["create"].status == "running"
    assert await alive(world, agent.host) is (first == "create" and not force)
    await world.settle()


@pytest.mark.parametrize("when", ["before", "under way"])
@pytest.mark.parametrize("force", [False, True])
async def test_beside_a_resume(virtual_clock, world, agent, plane, operator, fleet_of, force, when):
    """It keeps an unforced one off. Forced, whoever wakes it is told that it ended, and nothing is left awake."""
    row = await world.insert(agent, "paused")
    agent.add_paused(row.id)
    outcomes = {}
    resume = outcome(outcomes, "resume", lambda: plane.sandboxes.resume(world.principal, row.id))
    delete = outcome(outcomes, "delete", lambda: fleet_of(plane).delete(operator, agent.host, force=force))
    held = agent.hold("sandbox.destroy" if when == "before" and force else "sandbox.resume")
    async with trio.open_nursery() as nursery:
        if when == "under way":
            nursery.start_soon(resume)
            await agent.reached["sandbox.resume"].wait()
            nursery.start_soon(delete)
            await trio.sleep(1)
        else:
            nursery.start_soon(delete)
            if force:
                await agent.reached["sandbox.destroy"].wait()
            else:
                await trio.sleep(1)
            nursery.start_soon(resume)
            await trio.sleep(1)
        held.set()
    if force:
        assert outcomes["delete"] is None
        assert isinstance(outcomes["resume"], errors.CapsuleError)
        assert (await world.row(row.id)).status == "stopped"
        assert (agent.vms, agent.paused) == ({}, {})
    else:
        assert isinstance(outcomes["delete"], errors.HostHasSandboxes)
        assert outcomes["resume"].status == "running"
    assert await alive(world, agent.host) is not force


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("force", [False, True])
async def test_two_deletes(virtual_clock, world, agent, operator, fleet_of, trail, planes, force):
    """By one process or two: the host is deleted once, with one row in the trail, and both are told that it is gone."""
    if force:
        row = await world.insert(agent, "running")
        agent.add_vm(row.id)
    used = [await world.control_plane() for _ in range(planes)]
    outcomes = {}
    async with trio.open_nursery() as nursery:
        for number in range(4):
            fleet = fleet_of(used[number % planes])
            nursery.start_soon(outcome(outcomes, number, lambda f=fleet: f.delete(operator, agent.host, force=force)))
    assert None in outcomes.values()
    assert {type(one) for one in outcomes.values()} <= {type(None), errors.NotFound}
    assert len(await trail("host", "delete")) == 1
    assert len(await trail("sandbox", "destroy")) == int(force)
    assert not await alive(world, agent.host)
    await world.settle()


async def test_forced_beside_unforced(virtual_clock, world, agent, plane, operator, fleet_of, trail):
    """While it is going, it has sandboxes; when it has gone, it is none."""
    row = await world.insert(agent, "paused")
    agent.add_paused(row.id)
    held = agent.hold("sandbox.destroy")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: fleet_of(plane).delete(operator, agent.host, force=True))
        await agent.reached["sandbox.destroy"].wait()
        with pytest.raises(errors.HostHasSandboxes):
            await fleet_of(plane).delete(operator, agent.host, force=False)
        held.set()
    with pytest.raises(errors.NotFound):
        await fleet_of(plane).delete(operator, agent.host, force=False)
    assert len(await trail("host", "delete")) == 1


@pytest.mark.parametrize("status", ["running", "paused"])
async def test_a_machine_that_was_away_is_left_alone(
    virtual_clock, world, agent, beats, operator, fleet_of, eventually, status
):
    """Nobody follows a host that was deleted: what it still has stays there, for whoever purges it."""
    plane = await world.control_plane(monitor=True)
    (agent.add_paused if status == "paused" else agent.add_vm)(one := uuid4())
    row = await world.insert(agent, status, sandbox=one)
    agent.cut_off()
    await fleet_of(plane).delete(operator, agent.host, force=True)
    asked = len(agent.asked)
    agent.come_back()
    await trio.sleep(120)
    assert (await world.row(row.id)).status == "error"
    assert len(agent.asked) == asked
    assert len(agent.vms) + len(agent.paused) == 1
