"""The monitor: one leads; hosts that fall silent, rows that nobody finishes, control planes that come and go."""

from __future__ import annotations

from datetime import timedelta

import pytest
import trio

from agent.actor.supervise import TooManyFailures
from capsule.db.errors import ConstraintViolated, DatabaseUnavailable
from capsule.monitor import monitor as module
from capsule.monitor.monitor import INTERVAL, OVERDUE_MARGIN, Monitor

ADVISORY = """from pg_locks where locktype = 'advisory'
              and database = (select oid from pg_database where datname = current_database())"""


@pytest.fixture
def eventually():
    """Looks every second of the virtual clock."""

    async def wait(condition, seconds=120):
        with trio.move_on_after(seconds):
            while not await condition():
                await trio.sleep(0.5)
        assert await condition()

    return wait


@pytest.fixture
async def beats(world, nursery):
    """The heartbeats of all agents that are well."""
    nursery.start_soon(world.beat)


async def host_status(world, agent):
    return (await world.sql("select status from hosts where id = $1", agent.host))[0]["status"]


async def marks(world):
    rows = await world.sql(
        "select action, scope, status, actor_type from audit_logs where resource_type = 'host' order by created_at"
    )
    return [tuple(row) for row in rows]


async def test_a_host_falls_silent_and_comes_back(virtual_clock, world, agent, beats, eventually):
    """After the heartbeat time-out it is `unreachable` and what lived there `missing`, in the trail, too; back again,
    what lives runs, and what died meanwhile is `error` with its reason."""
    rows = {status: await world.insert(agent, status) for status in ("running", "pausing", "resuming", "paused")}
    lives, dies, forgotten = [await world.insert(agent, "running") for _ in range(3)]
    for row in (rows["running"], lives, dies, forgotten):
        agent.add_vm(row.id)
    agent.add_paused(rows["paused"].id)
    await world.control_plane(monitor=True)
    await trio.sleep(60)
    agent.cut_off()
    began = trio.current_time()

    async def unreachable():
        return await host_status(world, agent) == "unreachable"

    await eventually(unreachable)
    assert world.settings.heartbeat_timeout - 10 <= trio.current_time() - began <= world.settings.heartbeat_timeout + 10
    assert await marks(world) == [("marked_down", "admin", "error", "system")]
    for row in (*[rows[status] for status in ("running", "pausing", "resuming")], lives, dies, forgotten):
        assert (await world.row(row.id)).status == "missing"
        assert "last heard" in (await world.row(row.id)).reason
    assert (await world.row(rows["paused"].id)).status == "paused"
    agent.die(dies.id, "out of memory")
    agent.forget(forgotten.id)
    agent.come_back()

    async def online():
        return await host_status(world, agent) == "online" and (await world.row(lives.id)).status == "running"

    await eventually(online)
    assert (await marks(world))[1:] == [("marked_up", "admin", "success", "system")]
    assert (await world.row(dies.id)).reason == "out of memory"
    assert (await world.row(lives.id)).reason is None
    assert {(await world.row(one.id)).status for one in (dies, forgotten)} == {"error"}


async def test_a_row_that_comes_late_to_a_host_that_is_away(virtual_clock, world, agent, beats, eventually):
    """Written after the host was marked: `missing`, too."""
    await world.control_plane(monitor=True)
    agent.cut_off()

    async def unreachable():
        return await host_status(world, agent) == "unreachable"

    await eventually(unreachable)
    late, rests = await world.insert(agent, "running"), await world.insert(agent, "paused")

    async def missing():
        return (await world.row(late.id)).status == "missing"

    await eventually(missing, 2 * INTERVAL)
    assert (await world.row(rests.id)).status == "paused"


async def test_a_host_that_comes_back_while_it_is_looked_after(
    virtual_clock, world, agent, beats, eventually, monkeypatch
):
    """Read as unreachable; by the time that its rows would be `missing` it is online, and one was resumed there."""
    await world.control_plane(monitor=True)
    agent.cut_off()

    async def unreachable():
        return await host_status(world, agent) == "unreachable"

    await eventually(unreachable)
    row = await world.insert(agent, "paused")
    come_back = trio.Event()
    token, read = trio.lowlevel.current_trio_token(), module._registered

    async def registered(connection):
        live = await read(connection)
        if not come_back.is_set():
            token.run_sync_soon(come_back.set)
            await connection.execute(
                "update hosts set status = 'online', generation = generation + 1, last_heartbeat = $1", world.now()
            )
            for step, status in enumerate(("resuming", "running"), row.generation + 1):
                await connection.execute(
                    "update sandboxes set status = $1, generation = $2, transition_deadline = $3",
                    status,
                    step,
                    world.now() + timedelta(hours=1) if status == "resuming" else None,
                )
        return live

    monkeypatch.setattr(module, "_registered", registered)
    await come_back.wait()
    await trio.sleep(INTERVAL / 2)
    after = await world.row(row.id)
    assert (after.status, after.generation) == ("running", row.generation + 2)


async def test_a_host_that_lists_and_does_not_beat(virtual_clock, world, agent, beats, eventually):
    """Marked once; its follower says what runs, and nobody says otherwise again and again."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    await world.control_plane(monitor=True)
    agent.beats = False

    async def unreachable():
        return await host_status(world, agent) == "unreachable"

    await eventually(unreachable, 200)
    await trio.sleep(60)
    after = await world.row(row.id)
    assert (after.status, after.generation) == ("running", row.generation + 2)


async def test_nobody_is_silent_who_could_not_be_heard(virtual_clock, world, agent, eventually, nursery):
    """All control planes were away for an hour: hosts get the time of a heartbeat, then they are judged."""
    dead = await world.add_host()
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    dead.cut_off()
    await world.sql("update hosts set last_heartbeat = $1", world.now() - timedelta(hours=1))
    await world.control_plane(monitor=True)
    await trio.sleep(world.settings.heartbeat_interval - 1)
    nursery.start_soon(world.beat)
    assert await marks(world) == []

    async def judged():
        return await host_status(world, dead) == "unreachable"

    await eventually(judged)
    assert await host_status(world, agent) == "online"
    assert (await world.row(row.id)).status == "running"


async def test_rows_that_nobody_finishes(virtual_clock, world, agent, beats, eventually):
    """Trap 22: `pending`, `starting` and `stopping` whose maker is gone, also where the host is away; not before their
    time, and what the host has made runs."""
    away = await world.add_host()
    away.cut_off()
    rows = {
        "pending": await world.insert(agent, "pending", deadline=timedelta(seconds=30)),
        "starting, away": await world.insert(away, "starting", deadline=timedelta(seconds=30)),
        "starting, absent": await world.insert(agent, "starting", deadline=timedelta(seconds=30)),
        "starting, made": await world.insert(agent, "starting", deadline=timedelta(seconds=30)),
        "stopping, absent": await world.insert(agent, "stopping", deadline=timedelta(seconds=30)),
        "stopping, away": await world.insert(away, "stopping", deadline=timedelta(seconds=30)),
    }
    nowhere = await world.insert(agent, "pending")
    await world.sql(
        """update sandboxes set status = 'stopping', generation = 2, transition_deadline = $2 where id = $1""",
        nowhere.id,
        world.now() + timedelta(seconds=30),
    )
    agent.add_vm(rows["starting, made"].id)
    await world.control_plane(monitor=True)
    await trio.sleep(20)

    async def statuses():
        return {name: (await world.row(row.id)).status for name, row in rows.items()}

    early = {"pending": "pending", "starting, away": "starting", "starting, absent": "starting"}
    assert early.items() <= (await statuses()).items()
    await trio.sleep(10 + OVERDUE_MARGIN.total_seconds() + 2 * INTERVAL)
    assert await statuses() == {
        "pending": "error",
        "starting, away": "error",
        "starting, absent": "error",
        "starting, made": "running",
        "stopping, absent": "stopped",
        "stopping, away": "stopping",
    }
    assert (await world.row(nowhere.id)).status == "stopped"
    assert (await world.row(rows["pending"].id)).reason == "it was not started in time"


async def test_one_that_the_database_refuses_holds_up_no_other(
    virtual_clock, world, agent, beats, eventually, monkeypatch
):
    """A host and a row whose change is refused: the rounds go on."""
    other = await world.add_host()
    bad, good = [await world.insert(agent, "pending", deadline=timedelta(seconds=-60)) for _ in range(2)]
    mark, change = module._mark, module._change

    async def refuse_some(fn, what, tx, row, *args):
        if row.id == what:
            raise ConstraintViolated("made_up")
        await fn(tx, row, *args)

    monkeypatch.setattr(module, "_mark", lambda *args: refuse_some(mark, min(agent.host, other.host), *args))
    monkeypatch.setattr(module, "_change", lambda *args: refuse_some(change, bad.id, *args))
    await world.control_plane(monitor=True)
    await trio.sleep(60)
    assert (await world.row(good.id)).status == "error"
    assert (await world.row(bad.id)).status == "pending"
    agent.cut_off()
    other.cut_off()
    await trio.sleep(120)
    assert {await host_status(world, agent), await host_status(world, other)} == {"online", "unreachable"}


async def test_hosts_come_and_go(virtual_clock, world, agent, beats, eventually):
    """A new one is followed within an interval, a deleted one no longer."""
    plane = await world.control_plane(monitor=True)
    await trio.sleep(INTERVAL)
    new = await world.add_host()
    await trio.sleep(INTERVAL + 2)
    assert new.asked
    await world.sql("update hosts set deleted_at = now() where id = $1", agent.host)
    await trio.sleep(2 * INTERVAL)
    asked = len(agent.asked)
    await trio.sleep(5 * INTERVAL)
    assert len(agent.asked) == asked
    assert plane.monitor._followers.keys() == {new.host}


async def test_one_leads_and_another_takes_over(virtual_clock, world, agent, beats, eventually):
    """Of three on one database exactly one leads; when it dies, another one does, and rows go on being mended."""
    planes = [await world.control_plane(monitor=True) for _ in range(3)]

    async def one_leads():
        return sum(plane.monitor.leading for plane in planes) == 1

    for _ in range(2):
        await eventually(one_leads)
        await trio.sleep(60)
        assert await one_leads()
        leader = next(plane for plane in planes if plane.monitor.leading)
        leader.kill()
        planes.remove(leader)
        row = await world.insert(agent, "running")

        async def mended(one=row.id):
            return (await world.row(one)).status == "error"

        await eventually(mended)


async def test_the_lead_is_lost_and_taken_again(virtual_clock, world, agent, beats, eventually):
    """The session with the lock is ended on the server: it stops leading, and somebody leads again."""
    planes = [await world.control_plane(monitor=True) for _ in range(2)]
    for _ in range(3):

        async def one_leads():
            return sum(plane.monitor.leading for plane in planes) == 1 and bool(await world.sql(f"select 1 {ADVISORY}"))

        await eventually(one_leads, 600)
        (session,) = await world.sql(f"select pid {ADVISORY}")
        await world.sql("select pg_terminate_backend($1)", session["pid"])

        async def another_leads(was=session["pid"]):
            return was not in {one["pid"] for one in await world.sql(f"select pid {ADVISORY}")} and await one_leads()

        await eventually(another_leads, 600)
    row = await world.insert(agent, "running")

    async def mended():
        return (await world.row(row.id)).status == "error"

    await eventually(mended)


async def test_the_database_is_away_for_a_while(virtual_clock, world, agent, beats, eventually):
    """Rounds fail, the control plane stays, and the work goes on afterwards."""

    class Away:
        away = False

        def __getattr__(self, name):
            return getattr(world.db, name)

        async def _use(self, method, *args, **kwargs):
            await trio.lowlevel.checkpoint()
            if self.away:
                raise DatabaseUnavailable("away")
            return await method(*args, **kwargs)

        async def run(self, *args, **kwargs):
            return await self._use(world.db.run, *args, **kwargs)

        async def transaction(self, *args, **kwargs):
            return await self._use(world.db.transaction, *args, **kwargs)

        async def try_lead(self, *args, **kwargs):
            return await self._use(world.db.try_lead, *args, **kwargs)

    db = Away()
    plane = await world.control_plane(monitor=True, db=db)
    await trio.sleep(10)
    db.away = True
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    agent.die(row.id, "died unseen")
    await trio.sleep(120)
    assert (await world.row(row.id)).status == "running"
    db.away = False
    await world.settle(seconds=60)
    assert (await world.row(row.id)).reason == "died unseen"
    assert plane.monitor.leading


async def test_a_bug_now_and_then(virtual_clock, world, agent, beats, eventually, monkeypatch):
    """It stops leading and leads again; one that stays ends the control plane instead of looking after nothing."""
    failures = [RuntimeError("bug")] * 3
    look = Monitor._look

    async def buggy(self, nursery):
        if failures:
            raise failures.pop()
        await look(self, nursery)

    monkeypatch.setattr(Monitor, "_look", buggy)
    plane = await world.control_plane(monitor=True)
    row = await world.insert(agent, "running")

    async def mended():
        return (await world.row(row.id)).status == "error"

    await eventually(mended)
    plane.kill()
    failures.extend([RuntimeError("bug")] * 100)
    with pytest.raises(TooManyFailures):
        await Monitor(world.db, plane.links, world.settings).run()
