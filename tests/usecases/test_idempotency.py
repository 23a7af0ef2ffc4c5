"""Idempotency-Key: the same request sent again is the same sandbox, whoever else asks meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from capsule import errors


async def at_once(plane, world, request, key, count):
    """What `count` requests with the same key get when they come together."""
    outcomes = []

    async def create():
        try:
            outcomes.append((await plane.sandboxes.create(world.principal, request, key)).id)
        except errors.CapsuleError as err:
            outcomes.append(type(err))

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(create)
    return outcomes


async def test_again_with_the_same_body(virtual_clock, world, agent, plane, request_body):
    """The same sandbox, and nothing is asked of the host."""
    first = await plane.sandboxes.create(world.principal, request_body, "key")
    again = await plane.sandboxes.create(world.principal, replace(request_body), "key")
    assert again.id == first.id
    assert [method for method, _ in agent.asked] == ["sandbox.create"]


async def test_the_order_of_labels_does_not_make_another_body(virtual_clock, world, agent, plane, request_body):
    """A body is what it says, not how it is written."""
    one, other = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    first = await plane.sandboxes.create(world.principal, replace(request_body, metadata=one, envs=one), "key")
    again = await plane.sandboxes.create(world.principal, replace(request_body, metadata=other, envs=other), "key")
    assert again.id == first.id


@pytest.mark.parametrize("change", [{"vcpus": 2}, {"envs": {"A": "1"}}, {"metadata": {"A": "1"}}, {"timeout_sec": 1}])
async def test_again_with_another_body(virtual_clock, world, agent, plane, request_body, change):
    """409 before anything is placed, also while the first is under way."""
    gate = agent.hold("sandbox.create")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(plane.sandboxes.create, world.principal, request_body, "key")
        await agent.reached["sandbox.create"].wait()
        with pytest.raises(errors.IdempotencyKeyReused):
            await plane.sandboxes.create(world.principal, replace(request_body, **change), "key")
        gate.set()
    with pytest.raises(errors.IdempotencyKeyReused):
        await plane.sandboxes.create(world.principal, replace(request_body, **change), "key")
    assert len(await world.rows()) == 1


async def test_twenty_at_once(virtual_clock, world, agent, plane, request_body):
    """One sandbox for all of them."""
    agent.delay = 3
    outcomes = await at_once(plane, world, request_body, "key", 20)
    assert len(outcomes) == 20
    assert len(set(outcomes)) == len(await world.rows()) == len(agent.vms) == 1
    assert str(outcomes[0]) in agent.vms


async def test_twenty_at_once_for_the_last_place(virtual_clock, world, request_body):
    """That there is no room for twenty matters to none of them; nor does the quota."""
    agent = await world.add_host(memory_mb=640)
    await world.sql("update teams set max_sandboxes = 1 where id = $1", world.principal.team_id)
    plane = await world.control_plane()
    agent.delay = 3
    outcomes = await at_once(plane, world, request_body, "key", 20)
    assert outcomes == [outcomes[0]] * 20
    assert str(outcomes[0]) in agent.vms


async def test_over_two_control_planes(virtual_clock, world, agent, plane, request_body):
    """The database decides, not a process."""
    other = await world.control_plane()
    agent.delay = 3
    outcomes = []
    async with trio.open_nursery() as nursery:
        for one in (plane, other) * 3:

            async def ask(one=one):
                outcomes.extend(await at_once(one, world, request_body, "key", 2))

            nursery.start_soon(ask)
    assert len(set(outcomes)) == len(agent.vms) == 1


async def test_after_a_day_the_key_is_new(virtual_clock, world, agent, plane, request_body):
    """24 hours and not a minute less."""
    first = await plane.sandboxes.create(world.principal, request_body, "key")
    await world.sql("update idempotency_keys set created_at = now() - interval '23 hours 59 minutes'")
    assert (await plane.sandboxes.create(world.principal, request_body, "key")).id == first.id
    await world.sql("update idempotency_keys set created_at = now() - interval '24 hours 1 minute'")
    second = await plane.sandboxes.create(world.principal, replace(request_body, vcpus=2), "key")
    assert second.id != first.id


async def test_keys_are_the_teams_own(virtual_clock, world, agent, plane, request_body):
    """Another team's key of the same text is another key."""
    other = await world.add_team()
    first = await plane.sandboxes.create(world.principal, request_body, "key")
    second = await plane.sandboxes.create(other, replace(request_body, vcpus=2), "key")
    assert first.id != second.id


async def test_a_repeat_while_the_first_fails(virtual_clock, world, agent, plane, request_body):
    """Whoever waits for it hears that it failed; repeating the key says to take a new one, which works."""
    gate = agent.hold("sandbox.create")
    agent.faults["sandbox.create"] = Fault(FaultCode.INTERNAL, "no kvm")
    outcomes = []
    async with trio.open_nursery() as nursery:

        async def ask():
            outcomes.extend(await at_once(plane, world, request_body, "key", 3))

        nursery.start_soon(ask)
        await agent.reached["sandbox.create"].wait()
        gate.set()
    assert outcomes == [errors.HostUnavailable] * 3
    agent.faults.clear()
    with pytest.raises(errors.HostUnavailable, match=r"no kvm; .* new Idempotency-Key") as caught:
        await plane.sandboxes.create(world.principal, request_body, "key")
    assert caught.value.retry_after is None
    assert (await plane.sandboxes.create(world.principal, request_body, "another")).status == "running"


async def test_a_repeat_after_its_end(virtual_clock, world, agent, plane, request_body):
    """The sandbox it made, as it is by now."""
    first = await plane.sandboxes.create(world.principal, request_body, "key")
    await plane.sandboxes.destroy(world.principal, first.id)
    assert (await plane.sandboxes.create(world.principal, request_body, "key")).status == "stopped"


@pytest.mark.parametrize("answers", [True, False])
async def test_a_repeat_of_one_that_nobody_finishes(virtual_clock, world, agent, plane, request_body, answers):
    """The control plane that was making it died: the repeat finishes it, or fails it in the time a create may take; it
    does not make another one."""
    gate = agent.hold("sandbox.create")
    other = await world.control_plane()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other.sandboxes.create, world.principal, request_body, "key")
        await agent.reached["sandbox.create"].wait()
        nursery.cancel_scope.cancel()
    other.kill()
    (sandbox,) = await world.rows()
    if answers:
        gate.set()
        view = await plane.sandboxes.create(world.principal, request_body, "key")
        assert (view.id, view.status) == (sandbox, "running")
        assert await world.disagreements() == []
    else:
        with pytest.raises((errors.HostUnavailable, errors.Busy)):
            await plane.sandboxes.create(world.principal, request_body, "key")
        assert trio.current_time() <= world.settings.create_timeout + 10
    assert list(await world.rows()) == [sandbox]
