"""Client, control plane or database goes away at any moment of a pause, resume, fork or snapshot: never half of one."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from capsule import errors
from capsule.model import CreateSnapshot

WHAT = ["pause", "resume", "fork", "snapshot", "delete snapshot"]


@pytest.fixture
def begin(world, agent):
    """What is to be interrupted, prepared: a sandbox in the status that it needs, and the call."""
    count = 0

    async def begin(plane, what):
        nonlocal count
        count += 1
        one = await world.insert(agent, "paused" if what == "resume" else "running")
        (agent.add_paused if what == "resume" else agent.add_vm)(one.id)
        who, name, key = world.principal, f"name-{count}", f"key {count}"
        request = CreateSnapshot(sandbox=one.id, name=name)
        if what == "delete snapshot":
            await plane.templates.create(who, request, None)
        works = {
            "pause": lambda by: by.sandboxes.pause(who, one.id),
            "resume": lambda by: by.sandboxes.resume(who, one.id),
            "fork": lambda by: by.sandboxes.fork(who, one.id, 2, key),
            "snapshot": lambda by: by.templates.create(who, request, key),
            "delete snapshot": lambda by: by.templates.delete(who, name),
        }
        return one.id, works[what]

    return begin


ALLOWED = {
    "pause": {"running", "paused"},
    "resume": {"running", "paused"},
    "fork": {"running", "error"},
    "snapshot": {"running"},
    "delete snapshot": {"running"},
}
"""What rows may be in the end: as before or as after, and children that did not come to be."""


@pytest.mark.parametrize("what", WHAT)
async def test_the_client_goes_away_at_every_moment(virtual_clock, world, agent, plane, begin, interrupted, what):
    """Either nothing was begun or it is done in the end."""
    agent.delay = 1
    cut, number = True, 0
    while cut:
        number += 1
        _, work = await begin(plane, what)
        cut = await interrupted(lambda work=work: work(plane), number)
        with trio.fail_after(60):
            while plane.operations.running():
                await trio.sleep(0.1)
        assert await world.disagreements() == []
    assert number > 1
    assert {row.status for row in (await world.rows()).values()} <= ALLOWED[what]


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("what", WHAT)
async def test_the_control_plane_dies_at_every_moment(
    virtual_clock, world, agent, nursery, begin, dying, what, answered
):
    """kill -9 in each wait of the operation: the next control plane makes rows and host agree."""
    nursery.start_soon(world.beat)
    agent.delay = 1
    calm = await world.control_plane()
    number, died = 0, True
    while died:
        number += 1
        plane = await world.control_plane()
        _, work = await begin(calm, what)
        with dying(plane, number, answered=answered) as counter, suppress(errors.Busy):
            await work(plane)
        died = counter.steps >= number
        plane.kill()
    assert number > 3
    await world.control_plane(monitor=True)
    await world.settle(seconds=1500)
    assert {row.status for row in (await world.rows()).values()} <= ALLOWED[what]


@pytest.mark.parametrize("how", ["refused", "lost", "away"])
@pytest.mark.parametrize("what", WHAT)
async def test_the_database_fails_at_every_use(virtual_clock, world, agent, nursery, begin, failing, what, how):
    """The client hears a 503 or gets what it asked for; repeating it brings it to its end."""
    nursery.start_soon(world.beat)
    calm = await world.control_plane()
    number, hit, refused = 0, True, []
    while hit:
        number += 1
        _, work = await begin(calm, what)
        database = failing(number, how)
        plane = await world.control_plane(db=database)
        try:
            await work(plane)
        except (errors.DatabaseUnavailable, errors.HostUnavailable, errors.Busy) as err:
            refused.append(err)
            with suppress(errors.NotFound):  # it was deleted, and the answer lost
                await work(calm)
        hit = database.uses >= number
        plane.kill()
    assert refused
    assert all(err.retry_after is not None for err in refused)
    await world.control_plane(monitor=True)
    await world.settle(seconds=1500)
    assert {row.status for row in (await world.rows()).values()} <= ALLOWED[what]
