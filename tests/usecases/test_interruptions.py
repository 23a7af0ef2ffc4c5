"""The client, the control plane or the database goes away at any moment of a create or a destroy: never half of one."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from capsule import errors
from capsule.db.errors import DatabaseUnavailable


class StepCounter(trio.abc.Instrument):
    """Counts the steps of one task, and calls `act` at the end of the n-th, when it waits for something, or
    (`answered`) at the beginning of the next, when it has what it waited for and does not know yet."""

    def __init__(self, number, act, *, answered=False):
        self.task = None
        self.steps = 0
        self._number = number
        self._act = act
        self._answered = answered

    def before_task_step(self, task):
        if task is self.task and self._answered and self.steps == self._number:
            self._act()

    def after_task_step(self, task):
        if task is self.task:
            self.steps += 1
            if self.steps == self._number and not self._answered:
                self._act()


class FailingDatabase:
    """The database, but for the n-th use: refused, or done with the answer lost; or refused from then on for a time."""

    def __init__(self, db, number, how):
        self._db = db
        self._number = number
        self._how = how
        self._back_at = None
        self.uses = 0

    def __getattr__(self, name):
        return getattr(self._db, name)

    async def run(self, fn, *args, **kwargs):
        return await self._use(self._db.run, fn, *args, **kwargs)

    async def transaction(self, fn, *args, **kwargs):
        return await self._use(self._db.transaction, fn, *args, **kwargs)

    async def _use(self, method, *args, **kwargs):
        self.uses += 1
        hit = self.uses == self._number
        if hit and self._how == "away":
            self._back_at = trio.current_time() + 60
        if (self._back_at or 0) > trio.current_time() or (hit and self._how == "refused"):
            await trio.lowlevel.checkpoint()
            raise DatabaseUnavailable("the test says so")
        answer = await method(*args, **kwargs)
        if hit and self._how == "lost":
            raise DatabaseUnavailable("the answer is lost")
        return answer


async def interrupted(work, number):
    """Run `work` and cancel it in its n-th wait; whether there was one."""
    scope = trio.CancelScope()
    counter = StepCounter(number, scope.cancel)

    async def run():
        counter.task = trio.lowlevel.current_task()
        with scope:
            await work()

    trio.lowlevel.add_instrument(counter)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
    finally:
        trio.lowlevel.remove_instrument(counter)
    return scope.cancelled_caught


async def test_the_client_goes_away_at_every_moment_of_a_create(virtual_clock, world, agent, plane, request_body):
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


async def test_the_client_goes_away_at_every_moment_of_a_destroy(virtual_clock, world, agent, plane, request_body):
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
    virtual_clock, world, agent, request_body, nursery, what, answered
):
    """kill -9 in each wait of the operation: the next control plane makes rows and host agree."""
    nursery.start_soon(world.beat)
    agent.delay = 1
    number, died = 0, True
    while died:
        number += 1
        plane = await world.control_plane()
        one = await plane.sandboxes.create(world.principal, request_body, None)
        counter = StepCounter(number, plane.kill, answered=answered)
        trio.lowlevel.add_instrument(counter)
        _watch_operation(plane, counter)
        with suppress(errors.Busy):
            if what == "create":
                await plane.sandboxes.create(world.principal, request_body, None)
            else:
                await plane.sandboxes.destroy(world.principal, one.id)
        trio.lowlevel.remove_instrument(counter)
        died = counter.steps >= number
        plane.kill()
    assert number > 3
    await world.control_plane(monitor=True)
    await world.settle()
    statuses = {row.status for row in (await world.rows()).values()}
    assert statuses <= ({"running", "error"} if what == "create" else {"running", "stopped"})


@pytest.mark.parametrize("how", ["refused", "lost", "away"])
@pytest.mark.parametrize("what", ["create", "create with a key", "destroy"])
async def test_the_database_fails_at_every_use(virtual_clock, world, agent, request_body, nursery, what, how):
    """The client hears a 503 or gets what it asked for; the monitor makes the rows true. Without the database nobody
    knows where a host is, so `host_unavailable` may be what is heard."""
    nursery.start_soon(world.beat)
    calm = await world.control_plane()
    number, hit, outcomes = 0, True, []
    while hit:
        number += 1
        one = await calm.sandboxes.create(world.principal, request_body, None)
        failing = FailingDatabase(world.db, number, how)
        plane = await world.control_plane(db=failing)
        try:
            if what == "destroy":
                await plane.sandboxes.destroy(world.principal, one.id)
            else:
                key = f"key {number}" if "key" in what else None
                assert (await plane.sandboxes.create(world.principal, request_body, key)).status == "running"
            outcomes.append("done")
        except (errors.DatabaseUnavailable, errors.HostUnavailable) as err:
            outcomes.append(err)
        hit = failing.uses >= number
        plane.kill()
    assert outcomes.pop() == "done"
    failures = [outcome for outcome in outcomes if outcome != "done"]
    assert failures
    assert all(err.retry_after is not None for err in failures)
    assert how == "away" or all(isinstance(err, errors.DatabaseUnavailable) for err in failures)
    await world.control_plane(monitor=True)
    await world.settle()


async def test_repeating_with_the_key_after_the_database_was_away(virtual_clock, world, agent, request_body, nursery):
    """Whenever it was away: in the end there is one sandbox for the key, or a clear refusal, never two."""
    nursery.start_soon(world.beat)
    await world.control_plane(monitor=True)
    refused = []
    for number in range(1, 8):
        failing = FailingDatabase(world.db, number, "lost")
        plane = await world.control_plane(db=failing)
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


def _watch_operation(plane, counter):
    """Have `counter` follow the task of the next operation."""
    work = plane.operations._work

    async def watched(*args):
        counter.task = trio.lowlevel.current_task()
        await work(*args)

    plane.operations._work = watched
