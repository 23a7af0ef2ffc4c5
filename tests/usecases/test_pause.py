"""Pausing and resuming: what a client gets, what the row says, what the host has, whatever goes wrong in between."""

from __future__ import annotations

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule import errors
from capsule.db.errors import DatabaseUnavailable


@pytest.fixture
async def resting(world, plane, agent):
    """The id of a paused sandbox."""
    row = await world.insert(agent, "paused")
    agent.add_paused(row.id)
    return row.id


async def trail(world, action):
    rows = await world.sql(
        "select actor_type, actor_name, status, metadata from audit_logs where action = $1 order by created_at", action
    )
    return [(row["actor_type"], row["actor_name"], row["status"], row["metadata"]) for row in rows]


async def at_once(work, count):
    """What each of `count` callers gets."""
    outcomes = []

    async def one():
        try:
            outcomes.append((await work()).status)
        except errors.CapsuleError as err:
            outcomes.append((type(err), err.message))

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return outcomes


async def asked(agent, method):
    return sum(name == method for name, _ in agent.asked)


async def test_there_and_back(virtual_clock, world, agent, plane, sandbox):
    """The view, the row, the host and the trail say the same; the address goes with the pause and comes anew."""
    paused = await plane.sandboxes.pause(world.principal, sandbox)
    assert (paused.status, paused.host_ip, paused.reason) == ("paused", None, None)
    assert list(agent.paused) == [str(sandbox)]
    assert await trail(world, "pause") == [("api_key", "key", "success", {"reason": "requested"})]
    resumed = await plane.sandboxes.resume(world.principal, sandbox)
    assert (resumed.status, resumed.host_ip) == ("running", agent.vms[str(sandbox)]["host_ip"])
    assert await trail(world, "resume") == [("api_key", "key", "success", {"template": "minimal"})]
    assert await world.disagreements() == []


async def test_what_is_there_already(virtual_clock, world, agent, plane, sandbox, resting):
    """200, nothing changes, nothing is in the trail."""
    assert (await plane.sandboxes.pause(world.principal, resting)).status == "paused"
    assert (await plane.sandboxes.resume(world.principal, sandbox)).status == "running"
    assert {(await world.row(one)).generation for one in (sandbox, resting)} == {3, 5}
    assert await world.sql("select 1 from audit_logs where resource_type = 'sandbox'") == []


@pytest.mark.parametrize("verb", ["pause", "resume"])
@pytest.mark.parametrize("status", list(Status))
async def test_every_other_status_is_refused(virtual_clock, world, agent, plane, verb, status):
    """409 with the status; rows that are on their way there are taken on (another test)."""
    if status in {"running", "paused"} or (verb, status) in {("pause", "pausing"), ("resume", "resuming")}:
        return
    row = await world.insert(agent, status.value)
    with pytest.raises(errors.InvalidState) as caught:
        await getattr(plane.sandboxes, verb)(world.principal, row.id)
    assert caught.value.extra == {"status": status}
    assert await world.row(row.id) == row
    assert agent.asked == []


async def test_another_teams(virtual_clock, world, agent, plane, sandbox):
    """404, also while its own team pauses it."""
    other = await world.add_team()
    gate = agent.hold("sandbox.pause")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(plane.sandboxes.pause, world.principal, sandbox)
        await agent.reached["sandbox.pause"].wait()
        for verb in (plane.sandboxes.pause, plane.sandboxes.resume):
            with pytest.raises(errors.NotFound):
                await verb(other, sandbox)
        with pytest.raises(errors.NotFound):
            await plane.sandboxes.fork(other, sandbox, 1, None)
        gate.set()


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_many_at_once(virtual_clock, world, agent, plane, sandbox, resting, verb, planes):
    """All get the same outcome; the row took each step once, the trail has one entry; in one process the host is asked
    once."""
    agent.delay = 2
    all_planes = [plane] + [await world.control_plane() for _ in range(planes - 1)]
    one = sandbox if verb == "pause" else resting
    before = (await world.row(one)).generation
    outcomes = []

    async def ask(of):
        outcomes.extend(await at_once(lambda: getattr(of.sandboxes, verb)(world.principal, one), 5))

    async with trio.open_nursery() as nursery:
        for each in all_planes:
            nursery.start_soon(ask, each)
    assert set(outcomes) == {"paused" if verb == "pause" else "running"}
    assert (await world.row(one)).generation == before + 2
    assert len(await trail(world, verb)) == 1
    assert await asked(agent, f"sandbox.{verb}") == planes
    assert await world.disagreements() == []


@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_many_at_once_when_it_fails(virtual_clock, world, agent, plane, sandbox, resting, verb):
    """All hear the same."""
    one = sandbox if verb == "pause" else resting
    agent.faults[f"sandbox.{verb}"] = Fault(FaultCode.IO_ERROR, "the disk says no")
    gate = agent.hold(f"sandbox.{verb}")
    outcomes = []

    async def ask():
        outcomes.extend(await at_once(lambda: getattr(plane.sandboxes, verb)(world.principal, one), 5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(1)
        gate.set()
    assert outcomes == [(errors.Conflict, "the disk says no")] * 5
    assert await asked(agent, f"sandbox.{verb}") == 1


async def test_a_full_disk(virtual_clock, world, agent, plane, sandbox):
    """The VM runs on, the row says so and why, the client hears `disk_full`; later it works."""
    agent.disk_full = True
    with pytest.raises(errors.DiskFull, match="disk is full"):
        await plane.sandboxes.pause(world.principal, sandbox)
    row = await world.row(sandbox)
    assert (row.status, row.reason) == ("running", "it could not be paused: the host's disk is full; it runs on")
    assert await world.disagreements() == []
    assert await trail(world, "pause") == []
    agent.disk_full = False
    assert (await plane.sandboxes.pause(world.principal, sandbox)).reason is None


async def test_a_damaged_snapshot(virtual_clock, world, agent, plane, resting):
    """409 `snapshot_damaged` naming the file; it rests as before, and can be destroyed."""
    message = "mem.header of its snapshot is damaged: bad checksum"
    agent.faults["sandbox.resume"] = Fault(FaultCode.SNAPSHOT_DAMAGED, message)
    with pytest.raises(errors.SnapshotDamaged, match=r"mem\.header"):
        await plane.sandboxes.resume(world.principal, resting)
    row = await world.row(resting)
    assert (row.status, row.reason) == ("paused", f"it could not be resumed: {message}")
    assert await world.disagreements() == []
    await plane.sandboxes.destroy(world.principal, resting)
    assert agent.paused == {}


async def test_a_host_without_room(virtual_clock, world, agent, plane, resting):
    """The host's own word: 503 that names the limit, and it rests as before."""
    agent.memory_mb = 100
    with pytest.raises(errors.NoHostsAvailable, match="100 MiB of memory"):
        await plane.sandboxes.resume(world.principal, resting)
    assert (await world.row(resting)).status == "paused"
    assert await world.disagreements() == []


async def test_a_resume_is_admitted_like_a_create(virtual_clock, world, request_body):
    """At rest it holds half; the other half has to be there, the row never leaves `paused` without."""
    agent = await world.add_host(memory_mb=1200 + 2 * 128)
    plane = await world.control_plane()
    first = await plane.sandboxes.create(world.principal, request_body, None)
    await plane.sandboxes.pause(world.principal, first.id)
    second = await plane.sandboxes.create(world.principal, request_body, None)  # 256 + 512
    assert (await plane.sandboxes.resume(world.principal, first.id)).status == "running"
    await plane.sandboxes.pause(world.principal, first.id)
    await world.sql("update hosts set memory_mb = 800 + 256")
    with pytest.raises(errors.NoHostsAvailable, match="256 MiB of memory") as caught:
        await plane.sandboxes.resume(world.principal, first.id)
    assert caught.value.extra == {"limits": ["memory_mb"]}
    assert (await world.row(first.id)).status == "paused"
    await plane.sandboxes.destroy(world.principal, second.id)
    await world.sql("update hosts set cordoned = true")  # its only copy is there
    assert (await plane.sandboxes.resume(world.principal, first.id)).status == "running"
    assert await world.disagreements() == []
    assert agent.paused == {}


async def test_the_host_of_a_resume_is_away(virtual_clock, world, agent, plane, resting):
    """503 without touching the row."""
    await world.sql("update hosts set status = 'unreachable', generation = generation + 1")
    with pytest.raises(errors.HostUnavailable):
        await plane.sandboxes.resume(world.principal, resting)
    assert (await world.row(resting)).generation == 5


@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_the_answer_is_lost(virtual_clock, world, agent, plane, sandbox, resting, verb):
    """Asked again; one that is there already is as good."""
    one = sandbox if verb == "pause" else resting
    agent.lose_answer_of.add(f"sandbox.{verb}")
    assert (await getattr(plane.sandboxes, verb)(world.principal, one)).status == (
        "paused" if verb == "pause" else "running"
    )
    assert await world.disagreements() == []


@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_the_agent_restarts_half_way(virtual_clock, world, agent, plane, sandbox, resting, verb, nursery):
    """It has given up what was not complete; it does it anew."""
    one = sandbox if verb == "pause" else resting
    agent.delay = 5

    async def restart():
        await trio.sleep(2)
        agent.restart()
        agent.delay = 0

    nursery.start_soon(restart)
    await getattr(plane.sandboxes, verb)(world.principal, one)
    assert await world.disagreements() == []


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_nobody_knows_whether_it_was_done(virtual_clock, world, agent, plane, sandbox, resting, verb, done):
    """A bug in the host, before or after: it is looked at, and the row says what is."""
    one = sandbox if verb == "pause" else resting
    original = agent._act_on

    async def act(method, body, stream):
        if method == f"sandbox.{verb}":
            if done:
                await original(method, body, stream)
            raise Fault(FaultCode.INTERNAL, "a bug")
        return await original(method, body, stream)

    agent._act_on = act
    outcomes = await at_once(lambda: getattr(plane.sandboxes, verb)(world.principal, one), 1)
    there = {"pause": "paused", "resume": "running"}[verb]
    assert outcomes == ([there] if done else [(errors.HostUnavailable, "a bug")])
    assert await world.disagreements() == []


@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_the_host_goes_away_half_way(virtual_clock, world, agent, sandbox, resting, verb, nursery):
    """503; the monitor makes the row true as soon as the host is back, not only when the time of the call is over."""
    nursery.start_soon(world.beat)
    plane = await world.control_plane(monitor=True)
    one = sandbox if verb == "pause" else resting
    agent.hold(f"sandbox.{verb}")

    async def cut():
        await agent.reached[f"sandbox.{verb}"].wait()
        agent.cut_off()

    nursery.start_soon(cut)
    with pytest.raises(errors.HostUnavailable, match="in a moment"):
        await getattr(plane.sandboxes, verb)(world.principal, one)
    assert (await world.row(one)).status in {"pausing", "resuming"}
    agent.held.clear()
    agent.come_back()
    await world.settle(seconds=30)
    assert (await world.row(one)).status == ("running" if verb == "pause" else "paused")


async def test_a_client_that_hangs_up(virtual_clock, world, agent, plane, sandbox):
    """Trap 4: the client goes away while the VM is being paused: the pause goes on, the snapshot stays."""
    gate = agent.hold("sandbox.pause")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(plane.sandboxes.pause, world.principal, sandbox)
        await agent.reached["sandbox.pause"].wait()
        nursery.cancel_scope.cancel()
    gate.set()
    with trio.fail_after(10):
        while (await world.row(sandbox)).status != "paused":
            await trio.sleep(0.1)
    assert list(agent.paused) == [str(sandbox)]
    assert (await plane.sandboxes.resume(world.principal, sandbox)).status == "running"


@pytest.mark.parametrize("lead", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("first", ["client", "reaper"])
async def test_a_pause_beside_the_reaper(virtual_clock, world, agent, sandbox, nursery, first, lead):
    """Trap 5: both pause at once: it is paused once, the client gets it, the trail has one entry, nothing is left in
    the outbox, and nobody finds it `error` or `running`. A row that a client has made `pausing` is the client's."""
    nursery.start_soon(world.beat)
    plane = await world.control_plane(monitor=True)
    agent.delay = 1
    views = []

    async def client():
        views.append(await plane.sandboxes.pause(world.principal, sandbox))

    async def reaper():
        assert await agent.auto_pause(sandbox)

    async with trio.open_nursery() as race:
        one, other = (client, reaper) if first == "client" else (reaper, client)
        race.start_soon(one)
        await trio.sleep(lead)
        race.start_soon(other)
    assert [view.status for view in views] == ["paused"]
    await trio.sleep(15)
    assert await world.disagreements() == []
    assert (await world.row(sandbox)).status == "paused"
    (entry,) = await trail(world, "pause")
    assert entry[0] == ("system" if (first, lead) == ("reaper", 1.5) else "api_key")


async def test_a_row_that_says_running_of_one_that_rests(virtual_clock, world, agent, plane, sandbox):
    """The host has auto-paused it and nobody has heard: the resume asks the host. The row has its new address, and what
    was seen of it before counts for nothing."""
    await world.sql("update sandboxes set host_ip = '10.11.0.1' where id = $1", sandbox)
    assert await agent.auto_pause(sandbox)
    before = await world.row(sandbox)
    view = await plane.sandboxes.resume(world.principal, sandbox)
    assert (view.status, view.host_ip) == ("running", "10.11.1.2")
    assert (await world.row(sandbox)).generation > before.generation
    assert await trail(world, "pause") == [("system", "monitor", "info", {"reason": "its host paused it"})]
    assert len(await trail(world, "resume")) == 1


async def test_the_news_of_an_auto_pause_overtakes_the_resume(virtual_clock, world, agent, plane, sandbox):
    """The monitor says `paused` while the host resumes: the row says `running` when the answer comes."""
    assert await agent.auto_pause(sandbox)
    gate = agent.hold("sandbox.resume")
    views = []

    async def resume():
        views.append(await plane.sandboxes.resume(world.principal, sandbox))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(resume)
        await agent.reached["sandbox.resume"].wait()
        await world.sql(
            "update sandboxes set status = 'pausing', generation = 4, transition_deadline = now() where id = $1",
            sandbox,
        )
        await world.sql(
            """update sandboxes set status = 'paused', generation = 5, transition_deadline = null, host_ip = null
               where id = $1""",
            sandbox,
        )
        gate.set()
    assert [view.status for view in views] == ["running"]
    agent.outbox.clear()
    assert await world.disagreements() == []


@pytest.mark.parametrize("again", [False, True])
async def test_a_confirmation_that_is_written_late(virtual_clock, world, agent, sandbox, nursery, again):
    """The host has said that it runs, the database was away, and meanwhile another paused it, and resumed it: what was
    seen belongs to an earlier life. It is looked at anew."""
    away = trio.Event()

    class Late:
        def __getattr__(self, name):
            return getattr(world.db, name)

        async def transaction(self, fn, *args):
            if fn.__name__ == "_make_true" and not away.is_set():
                raise DatabaseUnavailable("away")
            return await world.db.transaction(fn, *args)

    late, other = await world.control_plane(db=Late()), await world.control_plane()
    agent.delay, views = 1, []

    async def resume():
        views.append(await late.sandboxes.resume(world.principal, sandbox))

    nursery.start_soon(resume)
    await trio.sleep(1)
    await other.sandboxes.pause(world.principal, sandbox)
    if again:
        await other.sandboxes.resume(world.principal, sandbox)
    away.set()
    await trio.sleep(3)
    (view,), row = views, await world.row(sandbox)
    assert (view.status, row.status) == ("running", "running")
    assert view.host_ip == str(row.host_ip) == agent.vms[str(sandbox)]["host_ip"]
    assert len(await trail(world, "pause")) == len(await trail(world, "resume")) == 1


@pytest.mark.parametrize("verb", ["pause", "resume"])
@pytest.mark.parametrize("moment", [0, 1, 3])
async def test_beside_a_destroy(virtual_clock, world, agent, plane, sandbox, resting, verb, moment):
    """One winner: it ends `stopped`, nothing is left of it; the other gets its outcome, or 409."""
    one = sandbox if verb == "pause" else resting
    agent.delay = 2
    outcomes = []

    async def run():
        outcomes.extend(await at_once(lambda: getattr(plane.sandboxes, verb)(world.principal, one), 2))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.sleep(moment)
        await plane.sandboxes.destroy(world.principal, one)
    (outcome,) = set(outcomes)
    assert outcome in {"paused", "running"} if moment == 3 else outcome[0] == errors.InvalidState
    assert (await world.row(one)).status == "stopped"
    assert str(one) not in agent.vms.keys() | agent.paused.keys()


@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_another_process_left_it_half_way(virtual_clock, world, agent, plane, sandbox, resting, verb):
    """The control plane that was at it died: whoever asks next takes the row on, without waiting for its deadline."""
    one = sandbox if verb == "pause" else resting
    other = await world.control_plane()
    gate = agent.hold(f"sandbox.{verb}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(getattr(other.sandboxes, verb), world.principal, one)
        await agent.reached[f"sandbox.{verb}"].wait()
        nursery.cancel_scope.cancel()
    other.kill()
    gate.set()
    assert (await world.row(one)).status in {"pausing", "resuming"}
    began = trio.current_time()
    view = await getattr(plane.sandboxes, verb)(world.principal, one)
    assert view.status == ("paused" if verb == "pause" else "running")
    assert trio.current_time() - began < 5


async def test_calls_into_a_paused_one(virtual_clock, world, agent, plane, resting):
    """409 `invalid_state` that says it is paused."""
    for work in (plane.sandboxes.ping, plane.sandboxes.processes):
        with pytest.raises(errors.InvalidState) as caught:
            await work(world.principal, resting)
        assert caught.value.extra == {"status": "paused"}


async def test_rubbish_from_a_host_is_the_hosts_failure(virtual_clock, world, agent, plane, sandbox, resting):
    """503, and the row says what the host shows."""
    original = agent._act_on

    async def act(method, body, stream):
        return {} if method in {"sandbox.pause", "sandbox.resume"} else await original(method, body, stream)

    agent._act_on = act
    with pytest.raises(errors.HostUnavailable):
        await plane.sandboxes.pause(world.principal, sandbox)
    with pytest.raises(errors.HostUnavailable):
        await plane.sandboxes.resume(world.principal, resting)
    assert await world.disagreements() == []
