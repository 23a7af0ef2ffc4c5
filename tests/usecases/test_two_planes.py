"""Two control planes serve one fleet at once; one of them dies at work, and its clients go to the other."""

from __future__ import annotations

from collections import Counter
from functools import partial

import msgspec
import pytest
import trio

from capsule import errors

LOCKS = "locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())"
AGAIN = (errors.Busy, errors.HostUnavailable, errors.DatabaseUnavailable)
"""What a client hears whose control plane died or that came too early: it asks again."""


@pytest.mark.parametrize("creates", [12, 20])
async def test_a_burst_over_both_fills_the_hosts_and_no_more(virtual_clock, world, request_body, creates):
    """Each sees its own reservations only, so both sell the same place; the host refuses, and the create goes on
    elsewhere. As many run as there is room for, the others are told; repeated at the other one, all is the same."""
    agents = [await world.add_host(memory_mb=4 * 640) for _ in range(3)]
    for agent in agents:
        agent.memory_mb, agent.delay = 4 * 512, 1
    planes = [await world.control_plane() for _ in range(2)]
    made, refused = {}, set()

    async def create(number):
        try:
            made[number] = await planes[number % 2].sandboxes.create(world.principal, request_body, f"key {number}")
        except errors.NoHostsAvailable:
            refused.add(number)

    async with trio.open_nursery() as nursery:
        for number in range(creates):
            nursery.start_soon(create, number)
    assert len(made) == 12
    assert {len(agent.vms) for agent in agents} == {4}
    assert await world.disagreements() == []
    for number, view in made.items():
        again = await planes[1 - number % 2].sandboxes.create(world.principal, request_body, f"key {number}")
        assert (again.id, again.host_id) == (view.id, view.host_id)
    for number in refused:
        with pytest.raises((errors.NoHostsAvailable, errors.HostUnavailable)):
            await planes[1 - number % 2].sandboxes.create(world.principal, request_body, f"key {number}")
    assert [plane.scheduler.statistics().held for plane in planes] == [0, 0]


@pytest.mark.parametrize("after", [0.0, 0.99, 1.99, 2.01])
async def test_one_dies_with_its_hands_full(virtual_clock, world, agent, request_body, nursery, after):
    """kill -9 of the one that leads, with creates, pauses, resumes, deletes and a fork under way at both. Asked again,
    with its key, at the other one, each comes to its end, once; the other leads within 15 s."""
    nursery.start_soon(world.beat)
    other = await world.add_host()
    agent.delay = other.delay = 1
    world.settings = msgspec.structs.replace(world.settings, create_timeout=20.0)
    first = await world.control_plane(monitor=True)
    await _until(lambda: first.monitor.leading)
    second = await world.control_plane(monitor=True)
    who = world.principal
    ready = [await first.sandboxes.create(who, request_body, None) for _ in range(9)]
    for one in ready[3:6]:
        await first.sandboxes.pause(who, one.id)
    works = [
        *(partial(_create, who, request_body, f"key {n}") for n in range(8)),
        *(partial(_act, "pause", who, one.id) for one in ready[:3]),
        *(partial(_act, "resume", who, one.id) for one in ready[3:6]),
        *(partial(_act, "destroy", who, one.id) for one in ready[6:8]),
        partial(_fork, who, ready[8].id),
    ]
    outcomes = {}

    async def client(number, work):
        while number not in outcomes:
            plane = second if connections is None else (first, second)[number % 2]
            try:
                with trio.CancelScope() as connection:
                    if plane is first:
                        connections.append(connection)
                    outcomes[number] = await work(plane)
            except AGAIN:
                await trio.sleep(0.5)

    connections = []
    async with trio.open_nursery() as clients:
        for number, work in enumerate(works):
            clients.start_soon(client, number, work)
        await trio.sleep(after)
        for connection in connections:
            connection.cancel()
        connections = None
        first.kill()
        with trio.fail_after(15):
            while not second.monitor.leading:
                await trio.sleep(0.1)
    await world.settle()
    rows = await world.rows()
    assert Counter(outcomes[number].status for number in range(8)) == {"running": 8}
    assert len({outcomes[number].id for number in range(8)}) == 8
    statuses = [rows[one.id].status for one in ready]
    assert statuses == ["paused"] * 3 + ["running"] * 3 + ["stopped"] * 2 + ["running"]
    children = rows.keys() - {one.id for one in ready} - {outcomes[number].id for number in range(8)}
    assert len(children) == len(outcomes[len(works) - 1]) == 2
    assert {rows[child].status for child in children} <= {"running", "error"}
    assert not first.monitor.leading


async def test_nothing_of_a_leader_that_lost_its_lead_goes_on(virtual_clock, world, agent, nursery):
    """Its session is cut: its followers end before the other's begin to write, and it may lead again later."""
    nursery.start_soon(world.beat)
    await world.add_host()
    first = await world.control_plane(monitor=True)
    await _until(lambda: first.monitor.leading and _followers() == 2)
    second = await world.control_plane(monitor=True)
    for _ in range(4):
        leaders = [plane for plane in (first, second) if plane.monitor.leading]
        assert len(leaders) == 1
        await world.sql(f"select pg_terminate_backend(pid) from pg_locks where {LOCKS}")  # noqa: S608
        await _until(lambda old=leaders[0]: not old.monitor.leading)
        await _until(lambda: (first.monitor.leading or second.monitor.leading) and _followers() == 2)
        for plane in (first, second):
            assert bool(plane.monitor._followers) == plane.monitor.leading
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    agent.die(row.id)
    await world.settle()
    assert len(await world.sql("select pid from pg_locks where " + LOCKS)) == 1  # noqa: S608


async def _until(condition):
    with trio.fail_after(120):
        while not condition():
            await trio.sleep(0.1)


def _followers():
    """How many tasks follow a host, in this process."""
    waiting, count = [trio.lowlevel.current_root_task()], 0
    while waiting:
        task = waiting.pop()
        count += task.name.endswith("._run_in")
        waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return count


async def _create(who, request, key, plane):
    return await plane.sandboxes.create(who, request, key)


async def _act(what, who, sandbox, plane):
    return await getattr(plane.sandboxes, what)(who, sandbox)


async def _fork(who, sandbox, plane):
    return await plane.sandboxes.fork(who, sandbox, 2, "fork")
