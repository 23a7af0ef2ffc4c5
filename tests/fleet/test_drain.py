"""A host is drained by whoever follows it: a few at a time, through the ordinary pause, for as long as it drains."""

from __future__ import annotations

from uuid import uuid4

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from capsule.monitor import drain

REASON = '{"reason": "its host is being drained"}'


@pytest.fixture
def most_at_once(monkeypatch):
    """How many pauses an agent had under way at the same time."""

    async def watch(agent):
        most = 0
        while True:
            most = max(most, sum(vm["status"] == "pausing" for vm in agent.vms.values()))
            agent.most = most
            await trio.sleep(0.1)

    return watch


async def running(world, agent, count):
    ids = [uuid4() for _ in range(count)]
    for one in ids:
        agent.add_vm(one)  # first: a monitor may be looking
    return [await world.insert(agent, "running", sandbox=one) for one in ids]


def resting(world, rows):
    async def look():
        return {(await world.row(row.id)).status for row in rows} == {"paused"}

    return look


async def status(world, agent):
    [row] = await world.sql("select status, cordoned from hosts where id = $1", agent.host)
    return tuple(row)


async def test_all_that_runs_rests(
    virtual_clock, world, agent, beats, operator, fleet_of, trail, eventually, nursery, most_at_once
):
    """At most four at once, whatever else is there left alone; told as the system's doing. It stays draining until it
    is opened, and then nothing wakes by itself."""
    plane = await world.control_plane(monitor=True)
    rows = await running(world, agent, 13)
    agent.add_paused(one := uuid4())
    before = await world.insert(agent, "paused", sandbox=one)
    other = await world.add_host()
    [elsewhere] = await running(world, other, 1)
    agent.delay = 2
    nursery.start_soon(most_at_once, agent)
    await fleet_of(plane).drain(operator, agent.host)
    began = trio.current_time()
    await eventually(resting(world, rows), 60)
    assert trio.current_time() - began < 30  # one after the other as places are free, not four each round
    assert agent.most == drain.AT_ONCE
    assert await status(world, agent) == ("draining", True)
    assert (await world.row(before.id)) == before
    assert (await world.row(elsewhere.id)).status == "running"
    told = await trail("sandbox", "pause")
    assert {row[0] for row in told} == {f"sb-{row.id}" for row in rows}
    assert {row[1:] for row in told} == {("system", "monitor", "team", "info", REASON)}
    assert await trail("host", "drain") == [
        (f"host-{agent.host}", "user", "op@example.com", "admin", "info", "{}"),
    ]
    await fleet_of(plane).uncordon(operator, agent.host)
    await trio.sleep(60)
    assert await status(world, agent) == ("online", False)
    assert await resting(world, rows)()
    await world.settle()


async def test_a_create_beside_it(virtual_clock, world, agent, beats, operator, fleet_of, request_body, eventually):
    """Placed before, running after: it rests too."""
    plane = await world.control_plane(monitor=True)
    await trio.sleep(1)
    agent.delay = 5
    made = []

    async def create():
        made.append(await plane.sandboxes.create(world.principal, request_body, None))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(create)
        while not agent.vms:
            await trio.sleep(0.1)
        await fleet_of(plane).drain(operator, agent.host)
    await eventually(resting(world, made), 60)
    await world.settle()


async def test_another_control_plane_goes_on(virtual_clock, world, agent, beats, operator, fleet_of, eventually):
    """The one that was asked dies at once, the one that leads in the middle: the next one finishes."""
    asked = await world.control_plane()
    first = await world.control_plane(monitor=True)
    rows = await running(world, agent, 10)
    agent.delay = 3
    await fleet_of(asked).drain(operator, agent.host)
    asked.kill()

    async def some():
        return 1 <= len(agent.paused) < 8

    await eventually(some, 30)
    first.kill()
    await world.control_plane(monitor=True)
    await eventually(resting(world, rows), 400)
    await world.settle()


async def test_opened_in_the_middle(virtual_clock, world, agent, beats, operator, fleet_of, eventually):
    """What has not begun runs on."""
    plane = await world.control_plane(monitor=True)
    rows = await running(world, agent, 12)
    agent.delay = 5
    await fleet_of(plane).drain(operator, agent.host)

    async def begun():
        return len(agent.paused) >= 4

    await eventually(begun, 60)
    await fleet_of(plane).uncordon(operator, agent.host)
    await trio.sleep(60)
    ends = [(await world.row(row.id)).status for row in rows]
    assert set(ends) == {"running", "paused"}
    assert ends.count("paused") <= 2 * drain.AT_ONCE
    await world.settle()


async def test_one_that_cannot_be_paused(virtual_clock, world, agent, beats, operator, fleet_of, eventually):
    """It runs on, is tried again later, and keeps no place from the others."""
    plane = await world.control_plane(monitor=True)
    rows = await running(world, agent, 6)
    agent.faults["sandbox.pause"] = [Fault(FaultCode.DISK_FULL, "the disk is full") for _ in range(3)]
    await fleet_of(plane).drain(operator, agent.host)

    async def three():
        return len(agent.paused) == 3

    await eventually(three, 10)
    await trio.sleep(10)
    assert len(agent.paused) == 3
    await eventually(resting(world, rows), 2 * drain.AGAIN_AFTER)
    await world.settle()


async def test_a_host_that_is_away_meanwhile(virtual_clock, world, agent, beats, operator, fleet_of, eventually):
    """Its sandboxes are missing, as of any host that is silent; back again, it is drained."""
    plane = await world.control_plane(monitor=True)
    rows = await running(world, agent, 5)
    await trio.sleep(60)
    agent.cut_off()
    await fleet_of(plane).drain(operator, agent.host)

    async def missing():
        return {(await world.row(row.id)).status for row in rows} == {"missing"}

    await eventually(missing, 200)
    assert await status(world, agent) == ("draining", True)
    agent.come_back()
    await eventually(resting(world, rows), 200)
    await world.settle()
