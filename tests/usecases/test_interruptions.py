"""The client, the control plane or the database goes away at any moment of a create or a destroy: never half of one."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from capsule import errors


async def test_the_client_goes_away_at_every_moment_of_a_create(
    virtual_clock, world, agent, plane, request_body, interrupted
):
    """Either nothing was begun, or the sandbox runs in the end: there is no third thing."""
    agent.delay = 1
    cut, number, made = True, 0, 0
    while cut:
        number += 1

        async def create():
            await plane.sandboxes.create(world.principal, request_body, f"key {number}")  # noqa: B023 - run before the next

        cut = await interrupted(create, number)
        with trio.fail_after(30):
            await _idle(plane)
        assert await world.disagreements() == []
        assert {row.status for row in (await world.rows()).values()} <= {"running"}
        made = len(await world.rows())
    assert number > 2
    assert made == number - 1  # cut in its first wait it had not asked for anything


async def test_the_client_goes_away_at_every_moment_of_a_destroy(
    virtual_clock, world, agent, plane, request_body, interrupted
):
    """Either it runs as before, or it is gone in the end."""
    agent.delay = 1
    cut, number = True, 0
    while cut:
        number += 1
        one = await plane.sandboxes.create(world.principal, request_body, None)

        async def destroy():
            await plane.sandboxes.destroy(world.principal, one.id)  # noqa: B023 - run before the next

        cut = await interrupted(destroy, number)
        with trio.fail_after(30):
            await _idle(plane)
        assert (await world.row(one.id)).status in {"running", "stopped"}
        assert await world.disagreements() == []
    assert number > 1
    assert (await world.row(one.id)).status == "stopped"


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("what", ["create", "destroy"])
async def test_the_control_plane_dies_at_every_moment(
    virtual_clock, world, agent, request_body, nursery, dying, what, answered
):
    """kill -9 in each wait of the operation: the next control plane makes rows and host agree."""
    nursery.start_soon(world.beat)
    agent.delay = 1
    number, died = 0, True
    while died:
        number += 1
        plane = await world.control_plane()
        one = await plane.sandboxes.create(world.principal, request_body, None)
        with dying(plane, number, answered=answered) as counter, suppress(errors.Busy):
            if what == "create":
                await plane.sandboxes.create(world.principal, request_body, None)
            else:
                await plane.sandboxes.destroy(world.principal, one.id)
        died = counter.steps >= number
        plane.kill()
    assert number > 3
    await world.control_plane(monitor=True)
    await world.settle()
    statuses = {row.status for row in (await world.rows()).values()}
    assert statuses <= ({"running", "error"} if what == "create" else {"running", "stopped"})


@pytest.mark.parametrize("how", ["refused", "lost", "away"])
@pytest.mark.parametrize("what", ["create", "create with a key", "destroy"])
async def test_the_database_fails_at_every_use(virtual_clock, world, agent, request_body, nursery, failing, what, how):
    """The client hears a 503 or gets what it asked for; the monitor makes the rows true. Without the database nobody
    knows where a host is, so `host_unavailable` may be what is heard."""
    nursery.start_soon(world.beat)
    calm = await world.control_plane()
    number, hit, outcomes = 0, True, []
    while hit:
        number += 1
        one = await calm.sandboxes.create(world.principal, request_body, None)
        database = failing(number, how)
        plane = await world.control_plane(db=database)
        try:
            if what == "destroy":
                await plane.sandboxes.destroy(world.principal, one.id)
            else:
                key = f"key {number}" if "key" in what else None
                assert (await plane.sandboxes.create(world.principal, request_body, key)).status == "running"
            outcomes.append("done")
        except (errors.DatabaseUnavailable, errors.HostUnavailable) as err:
            outcomes.append(err)
        hit = database.uses >= number
        plane.kill()
    assert outcomes.pop() == "done"
    failures = [outcome for outcome in outcomes if outcome != "done"]
    assert failures
    assert all(err.retry_after is not None for err in failures)
    assert how == "away" or all(isinstance(err, errors.DatabaseUnavailable) for err in failures)
    await world.control_plane(monitor=True)
    await world.settle()


async def test_repeating_with_the_key_after_the_database_was_away(
    virtual_clock, world, agent, request_body, nursery, failing
):
    """Whenever it was away: in the end there is one sandbox for the key, or a clear refusal, never two."""
    nursery.start_soon(world.beat)
    await world.control_plane(monitor=True)
    refused = []
    for number in range(1, 8):
        plane = await world.control_plane(db=failing(number, "lost"))
        for _ in range(2):
            try:
                view = await plane.sandboxes.create(world.principal, request_body, f"key {number}")
                assert view.status == "running"
            except (errors.DatabaseUnavailable, errors.HostUnavailable, errors.Busy) as err:
                refused.append(type(err))
        plane.kill()
    await world.settle()
    assert errors.DatabaseUnavailable in refused
    claims = await world.sql("select resource_id from idempotency_keys")
    assert {claim["resource_id"] for claim in claims} == (await world.rows()).keys()


async def test_draining_waits_for_what_is_under_way(virtual_clock, world, agent, plane, request_body, nursery):
    """A create begun before the stop ends well; one begun after it is told to try again."""
    gate = agent.hold("sandbox.create")
    views = []

    async def create():
        views.append(await plane.sandboxes.create(world.principal, request_body, None))

    nursery.start_soon(create)
    await agent.reached["sandbox.create"].wait()
    drained = trio.Event()

    async def drain():
        await plane.operations.drain()
        drained.set()

    nursery.start_soon(drain)
    await trio.sleep(5)
    assert not drained.is_set()
    with pytest.raises(errors.Busy):
        await plane.sandboxes.create(world.principal, request_body, None)
    gate.set()
    with trio.fail_after(10):
        await drained.wait()
    assert [view.status for view in views] == ["running"]


async def _idle(plane):
    while plane.operations.running():
        await trio.sleep(0.1)
