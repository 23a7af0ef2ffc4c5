"""Hosts that have no room for a create, whatever the rows say: it goes to another one, once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from capsule import errors

FULL = Fault(FaultCode.NO_CAPACITY, "512 MiB do not fit: all are taken on this host", retryable=True)


@pytest.fixture
async def other(world, agent):
    """A second host."""
    return await world.add_host()


def asked(agent, method="sandbox.create"):
    return [body["sandbox_id"] for name, body in agent.asked if name == method]


async def test_it_goes_to_a_host_that_has_room(virtual_clock, world, agent, other, plane, request_body):
    """Whichever is asked first: it runs on the other one, and the full one has heard that it is not its own."""
    agent.faults["sandbox.create"] = FULL
    made = [await plane.sandboxes.create(world.principal, request_body, f"key {n}") for n in range(4)]
    assert {(view.status, view.host_id) for view in made} == {("running", other.host)}
    assert asked(agent, "sandbox.destroy") == asked(agent) != []
    assert len(asked(other)) == 4
    assert await world.disagreements() == []
    assert plane.scheduler.statistics().held == plane.operations.running() == 0
    again = await plane.sandboxes.create(world.principal, request_body, "key 0")
    assert again.id == made[0].id


async def test_nobody_has_room(virtual_clock, world, agent, other, plane, request_body):
    """Each is asked once; then the client hears what the last one said, and the row says so, too."""
    agent.faults["sandbox.create"] = other.faults["sandbox.create"] = FULL
    with pytest.raises(errors.NoHostsAvailable, match="512 MiB do not fit"):
        await plane.sandboxes.create(world.principal, request_body, None)
    assert [len(asked(one)) for one in (agent, other)] == [1, 1]
    (row,) = (await world.rows()).values()
    assert (row.status, row.started_at) == ("error", None)


async def test_only_hosts_that_were_open_to_it(virtual_clock, world, agent, other, plane, request_body):
    """The tags that were asked for count for the other host, too."""
    await world.sql("insert into host_tags (host_id, tag) values ($1, 'gpu')", agent.host)
    agent.faults["sandbox.create"] = FULL
    with pytest.raises(errors.NoHostsAvailable):
        await plane.sandboxes.create(world.principal, replace(request_body, metadata={"host_tags": "gpu"}), None)
    assert asked(other) == []


async def test_two_work_on_it(virtual_clock, world, agent, request_body):
    """The client asks again at another control plane while the first host is still thinking. Then it has room for
    one of the two and not for the other: one sandbox, on one host, and both hear of it."""
    agent.delay = 5
    for order in ([FULL, None], [None, FULL], [FULL, FULL]):
        first = await world.add_host()
        await world.sql("update hosts set cordoned = (id <> $1)", first.host)
        planes = [await world.control_plane() for _ in range(2)]
        gate = first.hold("sandbox.create")
        first.faults["sandbox.create"] = list(order)
        views, key = [], f"key {order}"

        async def create(plane, key=key, views=views):
            views.append(await plane.sandboxes.create(world.principal, request_body, key))

        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                for plane in planes:
                    nursery.start_soon(create, plane)
                    await first.reached["sandbox.create"].wait()
                await trio.sleep(5)
                await world.sql("update hosts set cordoned = false where id = $1", agent.host)
                gate.set()
        assert [view.status for view in views] == ["running"] * 2
        assert len({view.id for view in views}) == len({view.host_id for view in views}) == 1
        for plane in planes:
            plane.kill()
        first.held.clear()
        assert await world.disagreements() == []


@pytest.mark.parametrize("answered", [False, True])
async def test_the_control_plane_dies_at_every_moment(
    virtual_clock, world, agent, other, request_body, nursery, dying, answered
):
    """kill -9 in each wait of a create that is moved: a retry at the next control plane ends with one sandbox that
    runs, or with a refusal; rows and hosts agree in the end, and nothing is on two of them."""
    nursery.start_soon(world.beat)
    agent.delay = other.delay = 1
    full = min(agent, other, key=lambda one: one.host)  # a new control plane asks it first
    full.faults["sandbox.create"] = FULL
    number, died, outcomes = 0, True, []
    while died:
        number += 1
        plane = await world.control_plane()
        with dying(plane, number, answered=answered) as counter, suppress(errors.Busy):
            await plane.sandboxes.create(world.principal, request_body, f"key {number}")
        died = counter.steps >= number
        plane.kill()
        after = await world.control_plane()
        try:
            view = await after.sandboxes.create(world.principal, request_body, f"key {number}")
            outcomes.append(view.status)
        except errors.CapsuleError as err:
            outcomes.append(type(err).__name__)
        after.kill()
        assert not full.vms
    assert number > 5
    assert len(asked(full, "sandbox.destroy")) > 2  # it was moved, and some died thereafter
    assert set(outcomes) == {"running"}
    await world.control_plane(monitor=True)
    await world.settle()
