"""Deleting a host: refused while something lives or rests there, forced, and never half of it."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from uuid import uuid4

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from capsule import errors
from capsule.fleet import removal
from capsule.hosts.tokens import HostTokens, digest
from tests.fleet.joining import registration
from tests.people.together import refusal

LIVING = ("starting", "running", "pausing", "paused", "resuming", "missing", "stopping")


def put(agent, row):
    """The host has it, as its row says."""
    if row.status == "paused":
        agent.add_paused(row.id)
    elif row.status not in {"missing", "stopped", "error"}:
        agent.add_vm(row.id, row.status if row.status != "stopping" else "running")


async def gone(world, host):
    [row] = await world.sql("select deleted_at from hosts where id = $1", host)
    return row["deleted_at"] is not None


async def one_of_each(world, agent, statuses=LIVING):
    rows = {status: await world.insert(agent, status) for status in statuses}
    for row in rows.values():
        put(agent, row)
    return rows


async def test_an_empty_host_is_gone(people, keeper):
    """Its credentials are dead, its address is free, its copies are forgotten; what ended there keeps its name."""
    agent, token = await people.host()
    over = await people.sandbox(keeper.team, agent, "stopped")
    path, key = f"/v1/hosts/host-{agent.host}", await people.key(keeper)
    one = (await keeper.post(f"{path}/token")).json()["registration_token"]
    refresh = f"hrt-{'a' * 64}"
    await people.sql(
        "insert into host_refresh_tokens (host_id, family, sha256, expires_at) values ($1, $2, $3, now() + '1 hour')",
        agent.host,
        uuid4(),
        digest(refresh),
    )
    [template] = await people.sql(
        "insert into templates (team_id, name, type, vcpus, memory_mb) values ($1, 't', 'snapshot', 1, 1) returning id",
        keeper.team,
    )
    await people.sql("insert into template_hosts values ($1, $2)", template["id"], agent.host)
    assert (await keeper.get(f"{path}/delete-preview")).json()["sandbox_ids"] == []
    assert (await keeper.delete(path)).status_code == 204

    for answer in (await keeper.get(path), await keeper.delete(path), await keeper.post(f"{path}/token")):
        refusal(answer, 404, "not_found")
    beat = await people.nobody.post(f"{path}/heartbeat", headers={"X-Host-Token": token})
    refusal(beat, 404, "not_found")
    refusal(await people.nobody.post("/v1/hosts/auth/refresh", {"refresh_token": refresh}), 401, "unauthorized")
    assert HostTokens(people.settings).check(token).host_id == agent.host  # it is not the token that is bad
    left = await people.sql(
        """select host_id from host_refresh_tokens union all select host_id from host_registration_tokens
           union all select host_id from template_hosts union all select host_id from host_removals"""
    )
    assert left == []
    refusal(await people.nobody.post("/v1/hosts/register", registration(one)), 401, "unauthorized")
    assert (await key.get(f"/v1/sandboxes/{over}")).json()["host_id"] == f"host-{agent.host}"
    rows = await people.sql(
        "select action, actor_name, scope, status, metadata::text from audit_logs where action = 'delete'"
    )
    assert [tuple(row) for row in rows] == [("delete", keeper.email, "admin", "warning", "{}")]


@pytest.mark.parametrize("status", LIVING)
async def test_one_that_lives_or_rests_keeps_it(people, keeper, status):
    """Paused ones count, since their only copy is there; preview and refusal name the same."""
    agent, _ = await people.host()
    path = f"/v1/hosts/host-{agent.host}"
    sandbox = await people.sandbox(keeper.team, agent, status)
    await people.sandbox(keeper.team, agent, "error")
    preview = (await keeper.get(f"{path}/delete-preview")).json()
    assert (preview["host"]["id"], preview["sandbox_ids"]) == (f"host-{agent.host}", [sandbox])
    for how in ({}, {"params": {"force": "false"}}):
        assert refusal(await keeper.delete(path, **how), 409, "host_has_sandboxes")["sandbox_ids"] == [sandbox]
    assert (await keeper.get(path)).json()["cordoned"] is False
    refusal(await keeper.delete(path, params={"force": "perhaps"}), 400, "invalid_request")
    assert not await people.sql("select 1 from audit_logs where action in ('delete', 'destroy')")


async def test_forced_with_an_agent_that_answers(virtual_clock, world, agent, plane, operator, fleet_of, trail):
    """Everything is ended on the machine before the host is gone; no row is left that lives. The people of the
    sandboxes' teams are told what happened, and not by whom of the platform."""
    rows = await one_of_each(world, agent)
    other = await world.add_host()
    elsewhere = await world.insert(other, "running")
    put(other, elsewhere)
    await fleet_of(plane).delete(operator, agent.host, force=True)
    assert (agent.vms, agent.paused) == ({}, {})
    assert {status: (await world.row(row.id)).status for status, row in rows.items()} == dict.fromkeys(rows, "stopped")
    assert await gone(world, agent.host)
    assert await world.row(elsewhere.id) == elsewhere
    told = await trail("sandbox", "destroy")
    assert {row[0] for row in told} == {f"sb-{row.id}" for status, row in rows.items() if status != "stopping"}
    assert {row[1:] for row in told} == {
        ("system", "platform", "team", "warning", '{"reason": "its host was deleted"}'),
    }
    forced = '{"forced": "true", "sandboxes": "7"}'
    assert await trail("host", "delete") == [
        (f"host-{agent.host}", "user", "op@example.com", "admin", "warning", forced)
    ]


@pytest.mark.parametrize("status", ["unreachable", "online"])
async def test_forced_with_an_agent_that_is_away(virtual_clock, world, agent, plane, operator, fleet_of, status):
    """Nobody can end them: the rows say what became of them, without waiting for long."""
    rows = await one_of_each(world, agent)
    agent.cut_off()
    if status == "unreachable":
        await world.sql("update hosts set status = $2, generation = generation + 1 where id = $1", agent.host, status)
    began = trio.current_time()
    await fleet_of(plane).delete(operator, agent.host, force=True)
    assert trio.current_time() - began <= removal.PATIENCE
    assert await gone(world, agent.host)
    for row in rows.values():
        now = await world.row(row.id)
        assert (now.status, now.reason, now.transition_deadline) == ("error", "its host was deleted", None)
    with pytest.raises(errors.InvalidState, match="its host was deleted"):
        await plane.sandboxes.resume(world.principal, rows["paused"].id)


async def test_fifty_of_which_half_rest_and_some_do_not_end(
    virtual_clock, world, agent, plane, operator, fleet_of, monkeypatch
):
    """A host that ends a part of them and then hangs: the rest ends in `error`, all within the time given."""
    rows = [await world.insert(agent, "paused" if number % 2 else "running") for number in range(50)]
    for row in rows:
        put(agent, row)
    agent.delay = 4.0  # eight at once: sixteen of them in the time given
    began = trio.current_time()
    monkeypatch.setattr(removal, "PATIENCE", 10.0)
    await fleet_of(plane).delete(operator, agent.host, force=True)
    assert trio.current_time() - began < 15
    ends = [(await world.row(row.id)).status for row in rows]
    assert set(ends) == {"stopped", "error"}
    assert ends.count("stopped") >= removal.AT_ONCE
    assert await gone(world, agent.host)


async def test_one_that_cannot_be_ended_does_not_keep_the_others(
    virtual_clock, world, agent, plane, operator, fleet_of
):
    """A fault that is this sandbox's alone."""
    rows = [await world.insert(agent, "running") for _ in range(3)]
    for row in rows:
        put(agent, row)
    agent.faults["sandbox.destroy"] = [Fault(FaultCode.INTERNAL, "it does not end")]
    await fleet_of(plane).delete(operator, agent.host, force=True)
    assert sorted([(await world.row(row.id)).status for row in rows]) == ["error", "stopped", "stopped"]


@pytest.mark.parametrize("answers", [True, False])
async def test_whoever_began_dies(virtual_clock, world, agent, beats, operator, fleet_of, eventually, nursery, answers):
    """Between the two transactions: closed for good, its sandboxes on their way; another control plane's monitor ends
    them and, when it is due, the host."""
    rows = await one_of_each(world, agent, ("running", "paused"))
    first = await world.control_plane()
    held = agent.hold("sandbox.destroy")
    nursery.start_soon(_delete, fleet_of(first), operator, agent.host)
    await agent.reached["sandbox.destroy"].wait()
    first.kill()
    if not answers:
        agent.cut_off()
    held.set()
    assert {(await world.row(row.id)).status for row in rows.values()} == {"stopping"}
    assert not await gone(world, agent.host)
    second = await world.control_plane(monitor=True)
    with pytest.raises(errors.Conflict, match="being deleted"):
        await fleet_of(second).uncordon(operator, agent.host)
    await eventually(lambda: gone(world, agent.host), removal.PATIENCE + removal.MARGIN + 15)
    expected = "stopped" if answers else "error"
    assert {(await world.row(row.id)).status for row in rows.values()} == {expected}
    assert bool(agent.vms or agent.paused) is not answers


async def _delete(fleet, operator, host):
    with suppress(errors.CapsuleError):
        await fleet.delete(operator, host, force=True)


async def test_whoever_asked_hangs_up(virtual_clock, world, agent, plane, operator, fleet_of, eventually):
    """The work goes on without them."""
    rows = await one_of_each(world, agent, ("running", "paused"))
    held = agent.hold("sandbox.destroy")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_delete, fleet_of(plane), operator, agent.host)
        await agent.reached["sandbox.destroy"].wait()
        nursery.cancel_scope.cancel()
    held.set()
    await eventually(lambda: gone(world, agent.host), 20)
    assert {(await world.row(row.id)).status for row in rows.values()} == {"stopped"}


async def test_a_row_that_comes_late_is_due_with_the_host(virtual_clock, world, agent, plane, operator, fleet_of):
    """Placed before the host was closed, written after: it ends in `error` when the host goes."""
    one = await world.insert(agent, "running")
    put(agent, one)
    held = agent.hold("sandbox.destroy")
    late = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_delete, fleet_of(plane), operator, agent.host)
        await agent.reached["sandbox.destroy"].wait()
        late.append(await world.insert(agent, "starting", deadline=timedelta(seconds=120)))
        held.set()
    now = await world.row(late[0].id)
    assert (now.status, now.reason) == ("error", "its host was deleted")
    assert await gone(world, agent.host)
