"""Destroying sandboxes: once, twice, at once, during a create, while the host is away."""

from __future__ import annotations

from uuid import uuid4

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule import errors


@pytest.mark.parametrize("status", list(Status))
async def test_from_every_status(virtual_clock, world, agent, plane, status):
    """It ends `stopped`, one that failed stays `error`; what was destroyed by somebody is audited once."""
    row = await world.insert(agent, status.value)
    if row.host_id is not None:
        agent.add_vm(row.id)
    for _ in range(2):
        await plane.sandboxes.destroy(world.principal, row.id)
    after = await world.row(row.id)
    assert after.status == ("error" if status == Status.ERROR else "stopped")
    assert after.host_ip is None
    audited = await world.sql("select status from audit_logs where action = 'destroy'")
    assert [one["status"] for one in audited] == ([] if status in {"stopping", "stopped", "error"} else ["warning"])
    if status not in {"stopped", "error"}:
        assert agent.vms == {}
        assert after.generation == row.generation + (1 if status == Status.STOPPING else 2)


async def test_many_at_once(virtual_clock, world, agent, plane, request_body):
    """All hear that it is gone, the row took each step once, the trail has one entry."""
    one = await plane.sandboxes.create(world.principal, request_body, None)
    agent.delay = 2
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(plane.sandboxes.destroy, world.principal, one.id)
    row = await world.row(one.id)
    assert (row.status, row.generation) == ("stopped", 5)
    assert len(await world.sql("select 1 from audit_logs where action = 'destroy'")) == 1


@pytest.mark.parametrize("monitor", [False, True])
@pytest.mark.parametrize("moment", [0, 0.5, 1, 3])
async def test_during_a_create(virtual_clock, world, agent, request_body, monitor, moment):
    """Trap 7: one winner, and no VM that nobody knows. The creator hears what became of it."""
    plane = await world.control_plane(monitor=monitor)
    agent.delay = 2
    outcome = []

    async def create():
        try:
            outcome.append((await plane.sandboxes.create(world.principal, request_body, "key")).status)
        except errors.InvalidState as err:
            outcome.append(err.extra.get("status"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(create)
        while not (rows := await world.rows()):
            await trio.sleep(0.01)
        await trio.sleep(moment)
        await plane.sandboxes.destroy(world.principal, next(iter(rows)))
    assert outcome in (["running"], ["stopping"], ["stopped"], [None])
    assert (outcome == ["running"]) == (moment > 2)
    (row,) = (await world.rows()).values()
    assert row.status == "stopped"
    assert await world.disagreements() == []


async def test_before_the_host_hears_of_the_create(virtual_clock, world, agent, plane, request_body):
    """The destroy overtakes the create: the create is refused there, and no VM is made."""
    gate = agent.hold("sandbox.create")
    refused = []

    async def create():
        with pytest.raises(errors.InvalidState) as caught:
            await plane.sandboxes.create(world.principal, request_body, None)
        refused.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(create)
        await agent.reached["sandbox.create"].wait()
        (sandbox,) = await world.rows()
        await plane.sandboxes.destroy(world.principal, sandbox)
        gate.set()
    assert len(refused) == 1
    assert (agent.vms, await world.disagreements()) == ({}, [])


async def test_the_overtaking_destroy_is_forgotten_by_a_restart(
    virtual_clock, world, agent, plane, request_body, nursery
):
    """The agent makes what was ended already; the monitor ends it again."""
    nursery.start_soon(world.beat)
    gate = agent.hold("sandbox.create")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as creating:

            async def create():
                with pytest.raises(errors.InvalidState):
                    await plane.sandboxes.create(world.principal, request_body, None)
                scope.cancel()

            creating.start_soon(create)
            await agent.reached["sandbox.create"].wait()
            (sandbox,) = await world.rows()
            await plane.sandboxes.destroy(world.principal, sandbox)
            agent.ended.clear()
            gate.set()
            await trio.sleep_forever()
    assert list(agent.vms) == [str(sandbox)]
    await world.control_plane(monitor=True)
    await world.settle(seconds=10)


async def test_a_create_that_is_being_retried_ends_with_the_destroy(virtual_clock, world, agent, plane, request_body):
    """The host is away: nobody goes on asking it for a sandbox that is not wanted any more."""
    agent.cut_off()
    ended_at = []

    async def create():
        with pytest.raises(errors.InvalidState):
            await plane.sandboxes.create(world.principal, request_body, None)
        ended_at.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(create)
        await trio.sleep(1)
        (sandbox,) = await world.rows()
        with pytest.raises(errors.HostUnavailable):
            await plane.sandboxes.destroy(world.principal, sandbox)
    assert ended_at[0] < 10
    assert (await world.row(sandbox)).status == "stopping"


@pytest.mark.parametrize("back_after", [5, 300])
async def test_the_host_is_away(virtual_clock, world, agent, request_body, nursery, back_after):
    """503 that says what will happen, and it happens when the host is back."""
    nursery.start_soon(world.beat)
    plane = await world.control_plane(monitor=True)
    one = await plane.sandboxes.create(world.principal, request_body, None)
    agent.cut_off()

    async def come_back():
        await trio.sleep(back_after)
        agent.come_back()

    nursery.start_soon(come_back)
    if back_after < 30:
        await plane.sandboxes.destroy(world.principal, one.id)
    else:
        with pytest.raises(errors.HostUnavailable, match="when the host is back") as caught:
            await plane.sandboxes.destroy(world.principal, one.id)
        assert caught.value.retry_after is not None
        assert (await plane.sandboxes.get(world.principal, one.id)).status == "stopping"
        await trio.sleep(back_after)
    await world.settle(seconds=60)
    assert (await world.row(one.id)).status == "stopped"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (FaultCode.INTERNAL, errors.HostUnavailable),
        (FaultCode.DEADLINE_EXCEEDED, errors.HostUnavailable),
        (FaultCode.BUSY, errors.Busy),
        (FaultCode.DRAINING, errors.HostUnavailable),
    ],
)
async def test_the_host_cannot(virtual_clock, world, agent, request_body, nursery, code, error):
    """A typed refusal now; the monitor asks again until it is done."""
    nursery.start_soon(world.beat)
    plane = await world.control_plane(monitor=True)
    one = await plane.sandboxes.create(world.principal, request_body, None)
    agent.faults["sandbox.destroy"] = Fault(code, "cannot", retryable=True)
    with pytest.raises(error):
        await plane.sandboxes.destroy(world.principal, one.id)
    assert (await world.row(one.id)).status == "stopping"
    agent.faults.clear()
    await world.settle(seconds=60)
    assert (await world.row(one.id)).status == "stopped"


async def test_the_answer_is_lost(virtual_clock, world, agent, plane, request_body):
    """Asked again; a sandbox that is gone already is as good."""
    one = await plane.sandboxes.create(world.principal, request_body, None)
    agent.lose_answer_of.add("sandbox.destroy")
    await plane.sandboxes.destroy(world.principal, one.id)
    assert (await world.row(one.id)).status == "stopped"


async def test_another_teams(virtual_clock, world, agent, plane, request_body):
    """404, as for one that never was, and nothing is touched."""
    one = await plane.sandboxes.create(world.principal, request_body, None)
    other = await world.add_team()
    messages = set()
    for principal, sandbox in ((other, one.id), (other, uuid4()), (world.principal, uuid4())):
        with pytest.raises(errors.NotFound) as caught:
            await plane.sandboxes.destroy(principal, sandbox)
        messages.add(caught.value.message)
        with pytest.raises(errors.NotFound):
            await plane.sandboxes.get(principal, sandbox)
    assert len(messages) == 1
    assert (await world.row(one.id)).status == "running"


async def test_why_a_sandbox_ended_is_shown(virtual_clock, world, agent, request_body, nursery):
    """Its VM died: `error`, with the host's words, also when it is destroyed afterwards."""
    nursery.start_soon(world.beat)
    plane = await world.control_plane(monitor=True)
    one = await plane.sandboxes.create(world.principal, request_body, None)
    agent.die(one.id, "qemu was killed by signal 9")
    await world.settle()
    await plane.sandboxes.destroy(world.principal, one.id)
    view = await plane.sandboxes.get(world.principal, one.id)
    assert (view.status, view.reason) == ("error", "qemu was killed by signal 9")
