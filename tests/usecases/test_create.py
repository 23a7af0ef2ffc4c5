"""Creating sandboxes: what a client gets, what the row says, what the host has, whatever goes wrong in between."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from capsule import errors


async def test_a_sandbox_runs_when_the_answer_comes(virtual_clock, world, agent, plane, request_body):
    """The view, the row, the host and the audit trail say the same."""
    request = replace(request_body, vcpus=2, memory_mb=1024, timeout_sec=60, metadata={"a": "b"}, envs={"K": "V"})
    view = await plane.sandboxes.create(world.principal, request, None)
    assert (view.status, view.vcpus, view.memory_mb, view.timeout_sec) == ("running", 2, 1024, 60)
    assert (view.host_id, view.host_ip, view.metadata, view.reason) == (agent.host, "10.11.0.1", {"a": "b"}, None)
    assert view.started_at is not None
    assert await plane.sandboxes.get(world.principal, view.id) == view
    (body,) = [body for method, body in agent.asked if method == "sandbox.create"]
    assert body == {
        "sandbox_id": str(view.id),
        "template": "minimal",
        "vcpus": 2,
        "memory_mb": 1024,
        "hostname": f"sb-{view.id.hex[:12]}",
        "envs": {"K": "V"},
        "timeout_sec": 60,
    }
    (row,) = await world.sql("select actor_name, action, status, resource_id, metadata from audit_logs")
    assert tuple(row) == ("key", "create", "success", f"sb-{view.id}", {"template": "minimal"})
    assert await world.disagreements() == []


@pytest.mark.parametrize(
    ("limit", "change"),
    [
        ("max_vcpus", {"vcpus": 9}),
        ("max_memory_mb", {"memory_mb": 16385}),
        ("max_sandboxes", {}),
    ],
)
async def test_each_limit_of_the_team_is_named_when_it_is_hit(
    virtual_clock, world, agent, plane, request_body, limit, change
):
    """At the limit it works, one beyond is 403 and leaves nothing behind."""
    await world.sql("update teams set max_sandboxes = 1 where id = $1", world.principal.team_id)
    if limit == "max_sandboxes":
        await plane.sandboxes.create(world.principal, request_body, None)
    before = len(await world.rows())
    with pytest.raises(errors.QuotaExceeded) as caught:
        await plane.sandboxes.create(world.principal, replace(request_body, **change), "key")
    assert caught.value.extra == {"limit": limit}
    assert len(await world.rows()) == before
    assert await world.sql("select 1 from idempotency_keys") == []


async def test_two_at_once_at_the_limit(virtual_clock, world, agent, plane, request_body):
    """One gets the last place, the other is told which limit it was; an ended sandbox gives its place back."""
    await world.sql("update teams set max_sandboxes = 1 where id = $1", world.principal.team_id)
    outcomes = []

    async def create():
        try:
            outcomes.append(await plane.sandboxes.create(world.principal, request_body, None))
        except errors.QuotaExceeded as err:
            outcomes.append(err.extra["limit"])

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(create)
    (made,) = [outcome for outcome in outcomes if outcome != "max_sandboxes"]
    await plane.sandboxes.destroy(world.principal, made.id)
    assert (await plane.sandboxes.create(world.principal, request_body, None)).status == "running"


async def test_an_unknown_template(virtual_clock, world, agent, plane, request_body):
    """404, and no row."""
    with pytest.raises(errors.NotFound, match="nosuch"):
        await plane.sandboxes.create(world.principal, replace(request_body, template="nosuch"), None)
    assert await world.rows() == {}


async def test_no_host_has_room(virtual_clock, world, request_body):
    """503 that says which limit was in the way; without any host it says that."""
    plane = await world.control_plane()
    with pytest.raises(errors.NoHostsAvailable, match="no host is online") as caught:
        await plane.sandboxes.create(world.principal, request_body, None)
    assert caught.value.retry_after is not None
    await world.add_host(memory_mb=640)
    await plane.sandboxes.create(world.principal, request_body, None)
    with pytest.raises(errors.NoHostsAvailable, match="640 MiB of memory") as caught:
        await plane.sandboxes.create(world.principal, request_body, None)
    assert caught.value.extra == {"limits": ["memory_mb"]}


async def test_a_bad_request_is_not_told_to_try_again(virtual_clock, world, request_body):
    """Where the fleet is full, too: bad input is never a 5xx."""
    plane = await world.control_plane()
    with pytest.raises(errors.NotFound):
        await plane.sandboxes.create(world.principal, replace(request_body, template="nosuch"), None)
    with pytest.raises(errors.QuotaExceeded):
        await plane.sandboxes.create(world.principal, replace(request_body, vcpus=64), None)


async def test_each_failure_of_the_host(virtual_clock, world, agent, plane, request_body, error_of):
    """The API's error for it, the row in `error` with the reason, and no VM."""
    for code, error in error_of.items():
        agent.faults["sandbox.create"] = Fault(code, f"it was \x00 {code}", retryable=True)
        with pytest.raises(error):
            await plane.sandboxes.create(world.principal, request_body, None)
        (sandbox,) = await world.sql("select id from sandboxes order by created_at desc limit 1")
        view = await plane.sandboxes.get(world.principal, sandbox["id"])
        assert (view.status, view.reason, view.started_at) == ("error", f"it was   {code}", None)
    assert await world.disagreements() == []
    assert plane.scheduler.statistics().held == plane.operations.running() == 0


async def test_a_failure_that_cannot_pass_is_not_tried_again(virtual_clock, world, agent, plane, request_body):
    """Only what an agent that restarts answers is asked again, and only while there is time."""
    agent.faults["sandbox.create"] = Fault(FaultCode.UNAVAILABLE, "no", retryable=False)
    with pytest.raises(errors.HostUnavailable):
        await plane.sandboxes.create(world.principal, request_body, None)
    assert [method for method, _ in agent.asked] == ["sandbox.create"]


@pytest.mark.parametrize("code", [FaultCode.BUSY, FaultCode.DRAINING, FaultCode.UNAVAILABLE])
async def test_an_agent_that_restarts_is_asked_again(virtual_clock, world, agent, plane, request_body, code):
    """What it answers while it drains, starts, or is overrun does not reach the client."""
    agent.faults["sandbox.create"] = [Fault(code, "not now", retryable=True)] * 3
    assert (await plane.sandboxes.create(world.principal, request_body, None)).status == "running"


async def test_the_answer_is_lost(virtual_clock, world, agent, plane, request_body):
    """The agent made it, the connection died: asked again, the same sandbox, 201."""
    agent.lose_answer_of.add("sandbox.create")
    view = await plane.sandboxes.create(world.principal, request_body, None)
    assert view.status == "running"
    assert list(agent.vms) == [str(view.id)]
    assert [method for method, _ in agent.asked] == ["sandbox.create"] * 2


async def test_the_agent_restarts_half_way(virtual_clock, world, agent, plane, request_body, nursery):
    """It has given up what it was making; it makes it anew."""
    agent.delay = 5

    async def restart():
        await trio.sleep(2)
        agent.restart()
        agent.delay = 0

    nursery.start_soon(restart)
    view = await plane.sandboxes.create(world.principal, request_body, None)
    assert (view.status, await world.disagreements()) == ("running", [])


async def test_a_host_that_is_away_for_good(virtual_clock, world, agent, plane, request_body):
    """After the create time-out: 503, `error` with a reason that names no address."""
    agent.cut_off()
    began = trio.current_time()
    with pytest.raises(errors.HostUnavailable):
        await plane.sandboxes.create(world.principal, request_body, None)
    assert trio.current_time() - began == pytest.approx(world.settings.create_timeout, abs=6)
    (row,) = (await world.rows()).values()
    assert row.status == "error"
    assert ":7001" not in row.reason


async def test_a_host_that_never_answers(virtual_clock, world, agent, plane, request_body):
    """The time-out ends it; what the host makes all the same is the monitor's to end."""
    agent.hold("sandbox.create")
    with pytest.raises(errors.HostUnavailable):
        await plane.sandboxes.create(world.principal, request_body, None)
    assert trio.current_time() < world.settings.create_timeout + 5
    (row,) = (await world.rows()).values()
    assert row.status == "error"


async def test_an_address_that_is_none_is_not_kept(virtual_clock, world, agent, plane, request_body):
    """The host's word would be refused by the database and leave the row where it is."""
    original = agent._create
    for address in ("", "not an address", "10.0.0.0/8", "fe80::1%eth0", "10.11.0.1\0"):

        async def create(body, address=address):
            return {**await original(body), "host_ip": address}

        agent._create = create
        view = await plane.sandboxes.create(world.principal, request_body, None)
        assert (view.status, view.host_ip) == ("running", None)


async def test_rubbish_from_a_host_is_the_hosts_failure(virtual_clock, world, agent, plane, request_body):
    """503, never 400 or 500; the row is `error`."""
    for answer in ({}, {"sandbox_id": 5}, {"status": []}, {"host_ip": 7}):

        async def create(body, answer=answer):
            return answer

        agent._create = create
        with pytest.raises(errors.HostUnavailable):
            await plane.sandboxes.create(world.principal, request_body, None)
    assert {row.status for row in (await world.rows()).values()} == {"error"}


async def test_the_team_is_deleted_meanwhile(virtual_clock, world, agent, plane, request_body):
    """Between the request's check and the row: 403 `no_team`, nothing made."""
    await world.sql("update teams set deleted_at = now() where id = $1", world.principal.team_id)
    with pytest.raises(errors.NoTeam):
        await plane.sandboxes.create(world.principal, request_body, None)
    assert await world.rows() == {}


async def test_the_host_is_deleted_meanwhile(virtual_clock, world, agent, plane, request_body, monkeypatch):
    """Between the choice of the host and the row: 503, nothing made. With the row there the host cannot be deleted."""
    read = plane.scheduler._read

    async def read_and_delete():
        fleet = await read()
        await world.sql("update hosts set deleted_at = now()")
        return fleet

    monkeypatch.setattr(plane.scheduler, "_read", read_and_delete)
    with pytest.raises(errors.NoHostsAvailable, match="no host is online") as caught:
        await plane.sandboxes.create(world.principal, request_body, None)
    assert caught.value.retry_after is not None
    assert await world.rows() == {}


async def test_the_scheduler_has_too_much_to_do(virtual_clock, world, agent, plane, request_body, monkeypatch):
    """Its full mailbox is 503 `busy`, not a bug."""
    monkeypatch.setattr(plane.scheduler._requests, "_capacity", 0)
    with pytest.raises(errors.Busy):
        await plane.sandboxes.create(world.principal, request_body, None)


async def test_too_many_operations_at_once(virtual_clock, world, agent, plane, request_body, monkeypatch, nursery):
    """The one beyond the limit is 503 `busy` at once; the others are made."""
    monkeypatch.setattr(plane.operations, "_limit", 2)
    gate = agent.hold("sandbox.create")
    for _ in range(2):
        nursery.start_soon(plane.sandboxes.create, world.principal, request_body, None)
    with trio.fail_after(30):
        while plane.operations.running() < 2:
            await trio.sleep(0.1)
    with pytest.raises(errors.Busy):
        await plane.sandboxes.create(world.principal, request_body, None)
    gate.set()
    await world.settle()
    assert len(agent.vms) == 2


async def test_the_row_is_settled_by_the_monitor_first(virtual_clock, world, agent, request_body):
    """The answer is held up, the monitor sees the VM running: the client gets the running sandbox all the same."""
    plane = await world.control_plane(monitor=True)
    agent.lose_answer_of.add("sandbox.create")
    agent.delay = 3
    view = await plane.sandboxes.create(world.principal, request_body, None)
    assert (view.status, view.host_ip) == ("running", "10.11.0.1")
    assert UUID(next(iter(agent.vms))) == view.id
