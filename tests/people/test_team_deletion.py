"""Deleting a team: gone at once for everybody, and nothing of it is left on any host, whoever dies meanwhile."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
import trio

from capsule import errors
from capsule.auth.rate_limits import RateLimits
from capsule.db.errors import ConstraintViolated
from capsule.people import deletion
from capsule.people.teams import Teams
from capsule.principals import Session, User

BEGUN = ("pausing", "starting", "resuming")


@pytest.fixture
async def beats(world, nursery):
    """The heartbeats of all agents that are well."""
    nursery.start_soon(world.beat)


@pytest.fixture
def eventually():
    """Looks every second of the virtual clock."""

    async def wait(condition, seconds=300):
        with trio.move_on_after(seconds):
            while not await condition():
                await trio.sleep(0.5)
        assert await condition()

    return wait


@pytest.fixture
async def owner(world):
    """Who owns the world's team, acting for themselves."""
    [row] = await world.sql(
        """select u.id, u.email from users u join memberships m on m.user_id = u.id
           where m.team_id = $1 and m.role = 'owner'""",
        world.principal.team_id,
    )
    session = Session(id=uuid4(), issued_at=datetime.now(UTC), expires_at=datetime.now(UTC) + timedelta(hours=1))
    return User(id=row["id"], email=row["email"], name="Ada", session=session)


@pytest.fixture
def teams(world):
    """The use-cases, of a process that has no host links, no monitor and no time left."""
    return Teams(world.db, world.settings, RateLimits(world.db))


async def frozen(world, agent, source):
    """A template of the team, which the sandbox `source` was made from."""
    [row] = await world.sql(
        """insert into templates (team_id, name, type, vcpus, memory_mb, disk_mb)
           values ($1, 'frozen', 'snapshot', 1, 512, 1024) returning id""",
        world.principal.team_id,
    )
    await world.sql("insert into template_hosts (template_id, host_id) values ($1, $2)", row["id"], agent.host)
    await world.sql("update sandboxes set template_id = $2 where id = $1", source, row["id"])
    agent.snapshots[str(row["id"])] = {}


async def statuses(world):
    return {row["status"] for row in await world.sql("select status from sandboxes")}


async def trail(world, resource_type, action):
    rows = await world.sql(
        """select resource_id, actor_type, actor_name, scope, status, metadata::text from audit_logs
           where resource_type = $1 and action = $2 order by created_at, id""",
        resource_type,
        action,
    )
    return {row["resource_id"]: tuple(row)[1:] for row in rows}


async def test_everything_ends_on_every_host(virtual_clock, world, agent, beats, owner, teams, eventually):
    """Whatever its sandboxes are doing, with nobody left to end them but a monitor that starts later; on a host that is
    away, when it comes back. One audit row for each that was not ending already. Another team's are left alone."""
    away = await world.add_host()
    rows = {status: await world.insert(agent, status) for status in ("running", "paused", "missing", *BEGUN)}
    for status in ("running", "missing", *BEGUN):
        agent.add_vm(rows[status].id, "running" if status == "missing" else status)
    agent.add_paused(rows["paused"].id)
    rows["pending"] = await world.insert(agent, "pending")
    ending = await world.insert(agent, "stopping", deadline=timedelta(seconds=30))
    agent.add_vm(ending.id)
    far = [await world.insert(away, status) for status in ("running", "paused")]
    away.add_vm(far[0].id)
    away.add_paused(far[1].id)
    over = await world.insert(agent, "stopped")
    others = (await world.add_team()).team_id
    theirs = [await world.insert(agent, status, team=others) for status in ("running", "paused")]
    agent.add_vm(theirs[0].id)
    agent.add_paused(theirs[1].id)
    away.cut_off()

    await teams.delete(owner, world.principal.team_id)

    ended = [*rows.values(), *far]
    for row in ended:
        now = await world.row(row.id)
        assert (now.status, now.generation) == ("stopping", row.generation + 1)
    row = ("user", owner.email, "team", "warning", "{}")
    assert await trail(world, "sandbox", "destroy") == {f"sb-{one.id}": row for one in ended}
    team = f"team-{world.principal.team_id}"
    assert await trail(world, "team", "delete") == {team: ("user", owner.email, "admin", "warning", "{}")}
    await world.control_plane(monitor=True)

    async def gone_here():
        return {(await world.row(one.id)).status for one in (*rows.values(), ending)} == {"stopped"}

    await eventually(gone_here)
    assert {(await world.row(one.id)).status for one in far} == {"stopping"}
    assert (away.vms, away.paused) != ({}, {})
    assert set(agent.vms) == {str(theirs[0].id)}
    assert set(agent.paused) == {str(theirs[1].id)}
    away.come_back()

    async def gone_there():
        return {(await world.row(one.id)).status for one in far} == {"stopped"}

    await eventually(gone_there)
    assert (away.vms, away.paused) == ({}, {})
    assert await world.row(over.id) == over
    assert [(await world.row(one.id)).generation for one in theirs] == [one.generation for one in theirs]
    await world.settle()


async def test_a_host_that_restarts_meanwhile(virtual_clock, world, agent, beats, owner, teams, eventually):
    """The agent forgets what it was told to end; it is told again."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    agent.delay = 60
    await world.control_plane(monitor=True)
    await teams.delete(owner, world.principal.team_id)

    async def told():
        return agent.vms[str(row.id)]["status"] == "stopping"

    await eventually(told)
    agent.drop_connections()
    agent.vms[str(row.id)]["status"] = "running"
    agent.ended.clear()

    async def gone():
        return (await world.row(row.id)).status == "stopped"

    await eventually(gone)
    assert agent.vms == {}


async def test_its_templates_and_their_copies(virtual_clock, world, agent, beats, owner, teams, eventually):
    """Templates are gone at once, with a row each; copies go from every host, also from one that was away."""
    away = await world.add_host()
    made = {}
    for name, hosts, team in (
        ("one", (agent, away), world.principal.team_id),
        ("two", (away,), world.principal.team_id),
        ("theirs", (agent, away), (await world.add_team()).team_id),
    ):
        [row] = await world.sql(
            """insert into templates (team_id, name, type, vcpus, memory_mb) values ($1, $2, 'snapshot', 1, 512)
               returning id""",
            team,
            name,
        )
        made[name] = row["id"]
        for host in hosts:
            await world.sql("insert into template_hosts (template_id, host_id) values ($1, $2)", row["id"], host.host)
            host.snapshots[str(row["id"])] = {}
    away.cut_off()
    await teams.delete(owner, world.principal.team_id)
    rows = await trail(world, "snapshot", "delete")
    assert rows == {
        f"tpl-{made[name]}": ("user", owner.email, "team", "warning", f'{{"name": "{name}"}}')
        for name in ("one", "two")
    }
    await world.control_plane(monitor=True)

    async def copies():
        return {(row["template_id"], row["host_id"]) for row in await world.sql("select * from template_hosts")}

    async def gone_here():
        return (made["one"], agent.host) not in await copies()

    await eventually(gone_here)
    away.come_back()

    async def gone_there():
        return {template for template, _ in await copies()} == {made["theirs"]}

    await eventually(gone_there)
    assert set(agent.snapshots) == set(away.snapshots) == {str(made["theirs"])}
    [kept] = await world.sql("select name from templates where deleted_at is null and type = 'snapshot'")
    assert kept["name"] == "theirs"


@pytest.mark.parametrize("first", ["create", "delete"])
@pytest.mark.parametrize("what", ["create", "fork"])
async def test_a_create_beside_the_delete(
    virtual_clock, world, agent, beats, owner, teams, request_body, eventually, team_lock, first, what
):
    """Both want the team's row, and the template. The delete first: there is no team for the new one. The new one
    first: it is ended like all the others. Never is one left that lives, nor do they wait for each other."""
    source = await world.insert(agent, "running")
    agent.add_vm(source.id)
    await frozen(world, agent, source.id)
    plane = await world.control_plane(monitor=True)
    request_body = replace(request_body, template="frozen")
    outcomes = {}

    async def create():
        try:
            if what == "create":
                await plane.sandboxes.create(world.principal, request_body, None)
            else:
                outcomes["items"] = await plane.sandboxes.fork(world.principal, source.id, 2, None)
        except errors.CapsuleError as err:
            outcomes["create"] = err

    async def delete():
        await teams.delete(owner, world.principal.team_id)
        outcomes["delete"] = True

    before = world.db.statistics().retries
    async with team_lock(world, world.principal.team_id) as lock:
        for one in (create, delete) if first == "create" else (delete, create):
            await lock.queue(one)
    assert outcomes["delete"]
    assert world.db.statistics().retries == before  # a deadlock is one that is broken by trying again

    async def over():
        return await statuses(world) == {"stopped"} and not agent.vms and not agent.paused

    await eventually(over)
    if first == "delete":
        assert isinstance(outcomes["create"], errors.NoTeam)
        assert len(await world.rows()) == 1
    await world.settle()


@pytest.mark.parametrize("method", ["sandbox.create", "sandbox.pause", "sandbox.resume", "snapshot.create"])
async def test_what_is_under_way(virtual_clock, world, agent, beats, owner, teams, request_body, eventually, method):
    """A host is at work for the team while it is deleted: what it makes is ended, whoever asked gets an answer."""
    plane = await world.control_plane(monitor=True)
    row = await world.insert(agent, "paused" if method == "sandbox.resume" else "running")
    (agent.add_paused if method == "sandbox.resume" else agent.add_vm)(row.id)
    answers = []

    async def ask():
        calls = {
            "sandbox.create": lambda: plane.sandboxes.create(world.principal, request_body, None),
            "sandbox.pause": lambda: plane.sandboxes.pause(world.principal, row.id),
            "sandbox.resume": lambda: plane.sandboxes.resume(world.principal, row.id),
            "snapshot.create": lambda: plane.sandboxes.fork(world.principal, row.id, 2, None),
        }
        try:
            answers.append(await calls[method]())
        except errors.CapsuleError as err:
            answers.append(err)

    held = agent.hold(method)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await agent.reached[method].wait()
        await teams.delete(owner, world.principal.team_id)
        held.set()
    assert len(answers) == 1

    async def over():
        return await statuses(world) == {"stopped"} and not agent.vms and not agent.paused

    await eventually(over)
    await world.settle(3600)


async def test_a_control_plane_that_dies_in_it(virtual_clock, world, agent, beats, owner, teams, eventually):
    """The answer to the commit is lost, or it never came to it: the team is deleted with all that goes with it, or
    lives with all of it. Deleting again finds none, or does it."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)

    async def delete_then_die(tx):
        await deletion.delete(tx, owner, world.principal.team_id)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await world.db.transaction(delete_then_die)
    assert (await world.row(row.id)) == row
    assert await trail(world, "team", "delete") == await trail(world, "sandbox", "destroy") == {}
    await teams.delete(owner, world.principal.team_id)
    with pytest.raises(errors.NotFound):
        await teams.delete(owner, world.principal.team_id)
    assert len(await trail(world, "team", "delete")) == len(await trail(world, "sandbox", "destroy")) == 1


async def test_gone_for_everybody(people):
    """Sessions for it are of no team, its keys are refused as such, every route to it is 404, its slug is taken for
    ever, and logging in leads elsewhere."""
    team = await people.team_of_three()
    key = await people.key(team.admin)
    [slug] = [one["slug"] for one in (await team.owner.get("/v1/teams")).json() if one["id"] == team.wire_id]
    path = f"/v1/teams/{team.wire_id}"
    for person in (team.member, team.admin):
        assert (await person.delete(path)).json()["error"]["code"] == "forbidden"
    assert (await team.owner.delete(path)).status_code == 204
    for person in (team.owner, team.admin, team.member):
        for answer in (
            await person.get(path),
            await person.patch(path, {"name": "x"}),
            await person.delete(path),
            await person.get(f"{path}/members"),
            await person.post(f"{path}/members", {"email": person.email}),
            await person.patch(f"{path}/members/{team.member.wire_id}", {"role": "admin"}),
            await person.delete(f"{path}/members/{team.member.wire_id}"),
            await person.post(f"{path}/leave"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert (await person.post("/v1/auth/switch-team", {"team_id": team.wire_id})).status_code == 404
        assert team.wire_id not in [one["id"] for one in (await person.get("/v1/teams")).json()]
    for caller in (key, team.member, team.owner):
        answer = await caller.post("/v1/sandboxes", {})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_team")
    with pytest.raises(ConstraintViolated):
        await people.sql("insert into teams (name, slug) values ('x', $1)", slug)
    login = await people.nobody.post("/v1/auth/login", {"email": team.admin.email, "password": team.admin.password})
    assert login.json()["team_id"] not in {"", team.wire_id}


async def test_the_platform_team_stays(people):
    """Nobody is a member of it, so it is none that anybody could name; nor would the database let it go."""
    ada = await people.sign_up("Ada")
    await people.make_admin(ada, "hosts", "byoc", "directory", "templates")
    assert (await ada.delete(f"/v1/teams/team-{UUID(int=0)}")).status_code == 404
    with pytest.raises(ConstraintViolated):
        await people.sql("update teams set deleted_at = now() where id = $1", UUID(int=0))
