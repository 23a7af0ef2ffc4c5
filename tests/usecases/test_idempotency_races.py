"""Idempotency-Key: the same request at two control planes, one of which commits between two looks of the other."""

from __future__ import annotations

import pytest
import trio

from capsule import errors
from capsule.model import CreateSnapshot
from capsule.sandboxes.snapshots import Snapshots

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


async def test_a_snapshot_that_the_first_takes_back(
    virtual_clock, world, agent, plane, other, request_body, monkeypatch
):
    """It came beyond the quota, which has room when the second asks: what that one gets, nobody takes away."""
    source = await plane.sandboxes.create(world.principal, request_body, None)
    request = CreateSnapshot(sandbox=source.id, name="mine")
    freeze, remove, made = Snapshots._freeze, Snapshots._remove, []

    async def limit(most):
        await world.sql("update teams set max_templates = $2 where id = $1", world.principal.team_id, most)

    async def frozen(self, principal, plan):
        size = await freeze(self, principal, plan)
        if not made:
            await limit(0)
        return size

    async def removed(self, host, snapshot):
        if not made:
            made.append(None)
            await limit(1)
            made[0] = await other.templates.create(world.principal, request, "key")
        return await remove(self, host, snapshot)

    monkeypatch.setattr(Snapshots, "_freeze", frozen)
    monkeypatch.setattr(Snapshots, "_remove", removed)
    with pytest.raises(errors.QuotaExceeded):
        await plane.templates.create(world.principal, request, "key")
    assert list(agent.snapshots) == [str(made[0].id)]


async def test_a_snapshot_whose_key_the_first_gave_back(
    virtual_clock, world, agent, plane, other, request_body, monkeypatch
):
    """The second has seen it on the host by then, and does not write down what is being removed."""
    source = await plane.sandboxes.create(world.principal, request_body, None)
    request = CreateSnapshot(sandbox=source.id, name="mine")
    freeze, seen = Snapshots._freeze, []

    async def frozen(self, principal, plan):
        size = await freeze(self, principal, plan)
        seen.append(plan.id)
        if len(seen) == 1:  # the second's: the first one comes and goes meanwhile
            await world.sql("update teams set max_templates = 1")
            with pytest.raises(errors.QuotaExceeded):
                await plane.templates.create(world.principal, request, "key")
            await world.sql("update teams set max_templates = 1")
        else:
            await world.sql("update teams set max_templates = 0")
        return size

    monkeypatch.setattr(Snapshots, "_freeze", frozen)
    with pytest.raises(errors.Conflict):
        await other.templates.create(world.principal, request, "key")
    assert seen[0] == seen[1]
    assert agent.snapshots == {}
    assert not await world.sql("select from templates where type = 'snapshot'")
