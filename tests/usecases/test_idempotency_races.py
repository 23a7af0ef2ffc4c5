"""Idempotency-Key: the same request at two control planes, one of which commits between two looks of the other."""

from __future__ import annotations

import pytest
import trio

from capsule.model import CreateSnapshot

LOOKED = "from idempotency_keys"


@pytest.fixture
async def other(world, plane):
    """Another control plane."""
    return await world.control_plane()


async def test_a_create_that_found_no_host(virtual_clock, world, agent, plane, other, request_body, overtake):
    """The first one's sandbox is no more than the team may have: it is the one that was asked for."""
    await world.sql("update teams set max_sandboxes = 1 where id = $1", world.principal.team_id)
    await world.sql("update hosts set cordoned = true")
    first = []

    async def create():
        await world.sql("update hosts set cordoned = false")
        first.append(await plane.sandboxes.create(world.principal, request_body, "key"))

    overtaking = overtake(create, before="select from teams")  # the quota, when it knows that there is no host
    second = await other.sandboxes.create(world.principal, request_body, "key")
    assert overtaking.done
    assert second.id == first[0].id


@pytest.mark.parametrize("short", ["quota", "room"])
async def test_a_fork(virtual_clock, world, plane, other, request_body, overtake, short):
    """The first one's children are what was asked for, and no reason to make none."""
    source = await plane.sandboxes.create(world.principal, request_body, None)
    await world.sql("update hosts set memory_mb = $1", 3 * 640 if short == "room" else 6400)
    most = 3 if short == "quota" else 10
    await world.sql("update teams set max_sandboxes = $2 where id = $1", world.principal.team_id, most)
    first = []

    async def fork():
        first.extend(await plane.sandboxes.fork(world.principal, source.id, 2, "key"))

    overtaking = overtake(fork, after=LOOKED)
    second = await other.sandboxes.fork(world.principal, source.id, 2, "key")
    assert overtaking.done
    assert [child.id for child in second] == [child.id for child in first]
    assert await world.disagreements() == []


async def test_a_snapshot_of_one_that_is_being_paused_for_it(virtual_clock, world, agent, plane, other, request_body):
    """By the first of the two: the second waits for it, and both have the same template."""
    source = await plane.sandboxes.create(world.principal, request_body, None)
    request = CreateSnapshot(sandbox=source.id, name="mine", pause=True)
    gate = agent.hold("sandbox.pause")
    made = []

    async def freeze(at):
        made.append(await at.templates.create(world.principal, request, "key"))

    async with trio.open_nursery() as both:
        both.start_soon(freeze, plane)
        await agent.reached["sandbox.pause"].wait()
        both.start_soon(freeze, other)
        await trio.sleep(1)
        gate.set()
    assert len({view.id for view in made}) == len(agent.snapshots) == 1
    assert (await world.row(source.id)).status == "paused"
