"""Templates of sandboxes: made, started from, deleted on every host that has a copy, whatever goes wrong in between."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule import control, errors
from capsule.db.queries import templates
from capsule.model import CreateSandbox, CreateSnapshot
from capsule.monitor.copies import SNAPSHOT_GRACE
from capsule.principals import Session, User
from capsule.sandboxes.snapshots import ID_GOOD_FOR, Snapshots


@pytest.fixture
def freeze(world, plane, sandbox):
    """Makes a template of the sandbox."""

    async def freeze(name="mine", key=None, of=None, **fields):
        request = CreateSnapshot(sandbox=of or sandbox, name=name, **fields)
        return await plane.templates.create(world.principal, request, key)

    return freeze


@pytest.fixture
def start(world, plane):
    """Makes a sandbox from it."""

    async def start(template="mine", **fields):
        request = CreateSandbox(template=template, timeout_sec=0, metadata={}, envs={}, **fields)
        return await plane.sandboxes.create(world.principal, request, None)

    return start


async def test_a_running_one_runs_on(virtual_clock, world, agent, plane, sandbox, freeze):
    """The view, the rows, the host and the trail say the same; the id is the host's, too."""
    view = await freeze()
    assert (view.name, view.type, view.vcpus, view.memory_mb, view.size_bytes, view.platform) == (
        "mine",
        "snapshot",
        1,
        512,
        7,
        False,
    )
    assert list(agent.snapshots) == [str(view.id)]
    assert (await world.row(sandbox)).status == "running"
    (row,) = await world.sql("select * from audit_logs where resource_type = 'snapshot'")
    assert (row["action"], row["scope"], row["status"], row["resource_id"]) == (
        "create",
        "team",
        "success",
        f"tpl-{view.id}",
    )
    page = await plane.templates.list(world.principal, "snapshot", 10, None)
    assert page.items == (view,)
    assert await world.disagreements() == []


@pytest.mark.parametrize("pause", [False, True])
async def test_a_paused_one_stays_paused(virtual_clock, world, agent, plane, sandbox, freeze, pause):
    await plane.sandboxes.pause(world.principal, sandbox)
    await freeze(pause=pause)
    assert (await world.row(sandbox)).status == "paused"
    assert await world.disagreements() == []


async def test_pausing_it_as_well(virtual_clock, world, agent, plane, sandbox, freeze):
    """`pause`: it is paused first, in the trail, too."""
    await freeze(pause=True)
    assert (await world.row(sandbox)).status == "paused"
    actions = await world.sql("select action from audit_logs where actor_type = 'api_key' order by created_at")
    assert [row["action"] for row in actions] == ["pause", "create"]


@pytest.mark.parametrize("status", sorted(set(Status) - {"running", "paused"}))
async def test_every_other_status_is_refused(virtual_clock, world, agent, plane, freeze, status):
    row = await world.insert(agent, status)
    with pytest.raises(errors.InvalidState) as caught:
        await freeze(of=row.id)
    assert caught.value.extra == {"status": status}
    with pytest.raises(errors.NotFound):
        await freeze(of=uuid4())
    assert agent.asked == []


async def test_without_a_name(virtual_clock, world, agent, freeze):
    """One is made up, each its own."""
    first, second = await freeze(None), await freeze(None)
    assert first.name.startswith("minimal-")
    assert first.name != second.name


async def test_a_taken_name(virtual_clock, world, agent, plane, sandbox, freeze):
    """409 before the host is asked; the platform's names are taken, another team's are not."""
    await freeze()
    for name in ("mine", "minimal"):
        with pytest.raises(errors.Conflict, match="already"):
            await freeze(name, key="key")
    assert len(agent.snapshots) == 1
    assert await world.sql("select 1 from idempotency_keys") == []
    await plane.templates.delete(world.principal, "mine")
    assert (await freeze()).name == "mine"


async def test_two_at_once_for_a_name(virtual_clock, world, agent, freeze):
    """One gets it; of the other nothing is left on the host."""
    agent.delay = 2
    outcomes = []

    async def one():
        try:
            outcomes.append((await freeze()).name)
        except errors.Conflict:
            outcomes.append("taken")

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one)
    assert sorted(outcomes) == ["mine", "taken", "taken"]
    assert await world.disagreements() == []


async def test_no_more_than_the_team_may_have(virtual_clock, world, agent, plane, freeze):
    """403 naming the limit, before the host is asked; of several at once at the limit one is made, and nothing is left
    of the others. One deleted makes room."""
    await world.sql("update teams set max_templates = 2 where id = $1", world.principal.team_id)
    await freeze("first")
    agent.delay, outcomes = 1, []

    async def one(name):
        try:
            outcomes.append((await freeze(name, key=name)).type)
        except errors.QuotaExceeded as err:
            outcomes.append(err.extra["limit"])

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(one, f"at-once-{number}")
    assert sorted(outcomes) == ["max_templates", "max_templates", "snapshot"]
    assert len(agent.snapshots) == 2
    asked = len(agent.asked)
    with pytest.raises(errors.QuotaExceeded, match="max_templates of your team is 2"):
        await freeze("third")
    assert len(agent.asked) == asked
    await plane.templates.delete(world.principal, "first")
    await freeze("third")
    assert await world.disagreements() == []


async def test_a_key_whose_snapshot_was_taken_back(virtual_clock, world, agent, plane, freeze):
    """The name was taken while the host worked: the key is free, and makes a snapshot once the name is."""
    gate = agent.hold("snapshot.create")
    async with trio.open_nursery() as nursery:

        async def refused():
            with pytest.raises(errors.Conflict, match="already"):
                await freeze(key="key")

        nursery.start_soon(refused)
        await agent.reached["snapshot.create"].wait()
        await world.sql(
            """insert into templates (team_id, name, type, vcpus, memory_mb, disk_mb)
               values ($1, 'mine', 'snapshot', 1, 1, 1)""",
            world.principal.team_id,
        )
        gate.set()
    assert agent.snapshots == {}
    await world.sql("delete from templates where name = 'mine'")
    await freeze(key="key")
    assert await world.disagreements() == []


async def test_a_key_that_stands_for_a_removed_snapshot(virtual_clock, world, agent, freeze):
    """Whoever took it back died before the key was free: 409 that says so, once."""
    agent.faults["snapshot.create"] = Fault(FaultCode.INTERNAL, "bug")
    with pytest.raises(errors.HostUnavailable):
        await freeze(key="key")
    agent.faults.clear()
    (claim,) = await world.sql("select resource_id from idempotency_keys")
    agent.removed.add(str(claim["resource_id"]))
    with pytest.raises(errors.Conflict, match="a new Idempotency-Key"):
        await freeze(key="key")
    await freeze(key="key")
    assert await world.disagreements() == []


async def test_a_key_of_long_ago(virtual_clock, world, agent, freeze, nursery):
    """What it began and nobody wrote down is about to be collected: a repeat makes another one, which stays."""
    nursery.start_soon(world.beat)
    agent.faults["snapshot.create"] = Fault(FaultCode.INTERNAL, "bug")
    with pytest.raises(errors.HostUnavailable):
        await freeze(key="key")
    agent.faults.clear()
    (claim,) = await world.sql("select resource_id from idempotency_keys")
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    await agent._freeze(str(claim["resource_id"]), str(row.id))
    await world.control_plane(monitor=True)
    await trio.sleep(SNAPSHOT_GRACE - 5)
    made = await freeze(key="key")
    assert made.id != claim["resource_id"]
    await trio.sleep(SNAPSHOT_GRACE + 60)
    assert list(agent.snapshots) == [str(made.id)]
    assert await freeze(key="key") == made
    assert ID_GOOD_FOR.total_seconds() <= SNAPSHOT_GRACE / 2
    assert await world.disagreements() == []


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(FaultCode.DISK_FULL, "no room"), errors.DiskFull),
        (Fault(FaultCode.SNAPSHOT_DAMAGED, "manifest.json"), errors.SnapshotDamaged),
        (Fault(FaultCode.INTERNAL, "bug"), errors.HostUnavailable),
        (Fault(FaultCode.NOT_FOUND, "gone", details={"object": "sandbox"}), errors.InvalidState),
    ],
)
async def test_a_host_that_cannot(virtual_clock, world, agent, sandbox, freeze, fault, error):
    """The typed error, no row, and the key is free to try again: with the same id."""
    agent.faults["snapshot.create"] = fault
    with pytest.raises(error):
        await freeze(key="key")
    assert (await world.row(sandbox)).status == "running"
    agent.faults.clear()
    made = await freeze(key="key")
    ids = {body["snapshot_id"] for method, body in agent.asked if method == "snapshot.create"}
    assert ids == {str(made.id)}


async def test_repeated_with_its_key(virtual_clock, world, agent, plane, freeze):
    """The same template, also at once, also when it was deleted since; another request is 409."""
    agent.delay = 1
    made = []

    async def one():
        made.append(await freeze(key="key"))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    assert set(made) == {made[0]}
    assert len(agent.snapshots) == 1
    with pytest.raises(errors.IdempotencyKeyReused):
        await freeze("other", key="key")
    await plane.templates.delete(world.principal, "mine")
    assert await freeze(key="key") == made[0]
    assert agent.snapshots == {}


async def test_one_key_on_two_control_planes(virtual_clock, world, agent, sandbox):
    """Both write it down at once, slowly, at the team's limit: one template, which both answer."""
    await world.sql("update teams set max_templates = 1 where id = $1", world.principal.team_id)

    class Slowly:
        def __getattr__(self, name):
            return getattr(world.db, name)

        async def transaction(self, fn, *args):
            async def slow(tx, *args):
                result = await fn(tx, *args)
                await tx.execute("select pg_sleep(0.3)")
                return result

            return await world.db.transaction(slow if fn.__name__ == "_write_down" else fn, *args)

    made = []

    async def one(plane):
        made.append(await plane.templates.create(world.principal, CreateSnapshot(sandbox=sandbox, name="mine"), "key"))

    planes = [await world.control_plane(db=Slowly()) for _ in range(2)]
    async with trio.open_nursery() as nursery:
        for plane in planes:
            nursery.start_soon(one, plane)
    assert made[0] == made[1]
    assert await world.disagreements() == []


async def test_the_answer_is_lost(virtual_clock, world, agent, freeze):
    """Asked again under the same id: one snapshot."""
    agent.lose_answer_of.add("snapshot.create")
    await freeze()
    assert len(agent.snapshots) == 1
    assert await world.disagreements() == []


async def test_sandboxes_start_from_it(virtual_clock, world, agent, plane, freeze, start):
    """With its vcpus, memory and disk, only on a host that has it; the host is told which."""
    template = await freeze()
    for _ in range(3):
        await world.add_host()
    children = [await start() for _ in range(3)]
    assert {child.host_id for child in children} == {agent.host}
    assert {(child.template, child.vcpus, child.memory_mb, child.disk_mb) for child in children} == {
        ("mine", 1, 512, 1024)
    }
    assert {agent.made_from[str(child.id)] for child in children} == {str(template.id)}
    assert (await world.row(children[0].id)).template_id == template.id


async def test_its_size_is_fixed(virtual_clock, world, agent, freeze, start):
    """400 naming the field for another one; the same one may be named."""
    await freeze()
    for field, value in (("vcpus", 2), ("memory_mb", 1024)):
        with pytest.raises(errors.InvalidRequest) as caught:
            await start(**{field: value})
        assert caught.value.extra == {"field": field}
    assert (await start(vcpus=1, memory_mb=512)).status == "running"


async def test_hosts_that_have_it_are_full_or_away(virtual_clock, world, agent, freeze, start):
    """503 that says so, whatever room others have; when no copy is left, 409 that says that."""
    await freeze()
    await world.add_host()
    await world.sql("update hosts set memory_mb = 700 where id = $1", agent.host)
    with pytest.raises(errors.NoHostsAvailable, match=r"only online host that has the snapshot lacks 640 MiB"):
        await start()
    await world.sql("update hosts set cordoned = true where id = $1", agent.host)
    with pytest.raises(errors.NoHostsAvailable, match="no host that has the snapshot is online"):
        await start()
    await world.sql("update template_hosts set lost_at = now()")
    with pytest.raises(errors.Conflict, match="no host has a copy"):
        await start()


async def test_unknown_and_foreign_ones(virtual_clock, world, agent, plane, freeze):
    """Another team's is as none: 404."""
    await freeze()
    other = await world.add_team()
    request = CreateSandbox(template="mine", timeout_sec=0, metadata={}, envs={})
    with pytest.raises(errors.NotFound):
        await plane.sandboxes.create(other, request, None)
    with pytest.raises(errors.NotFound):
        await plane.templates.delete(other, "mine")
    with pytest.raises(errors.NotFound):
        await plane.templates.delete(world.principal, "nosuch")
    with pytest.raises(errors.Forbidden, match="platform"):
        await plane.templates.delete(world.principal, "minimal")


async def test_in_use(virtual_clock, world, agent, plane, sandbox, freeze, start):
    """409 with the ids while sandboxes from it live or rest; afterwards it goes, from the host, too."""
    template = await freeze()
    live, resting = await start(), await start()
    await plane.sandboxes.pause(world.principal, resting.id)
    for users in ([live.id, resting.id], [resting.id]):
        with pytest.raises(errors.InUse) as caught:
            await plane.templates.delete(world.principal, "mine")
        assert caught.value.extra == {"sandbox_ids": [f"sb-{one}" for one in users]}
        await plane.sandboxes.destroy(world.principal, users[0])
    await plane.templates.delete(world.principal, "mine")
    assert agent.snapshots == {}
    assert await world.sql("select 1 from template_hosts") == []
    (row,) = await world.sql("select * from audit_logs where action = 'delete'")
    assert (row["resource_id"], row["status"]) == (f"tpl-{template.id}", "warning")
    with pytest.raises(errors.NotFound):
        await plane.templates.delete(world.principal, "mine")


async def test_a_create_beside_the_deletion(virtual_clock, world, agent, plane, freeze, start):
    """Whoever is first: a sandbox and a template in use, or no template and no sandbox. Never a sandbox of none."""
    for number in range(6):
        name = f"t{number}"
        await freeze(name)
        outcomes = []

        async def create(name=name, outcomes=outcomes):
            try:
                outcomes.append((await start(name)).status)
            except (errors.NotFound, errors.SnapshotDamaged) as err:
                outcomes.append(type(err))

        async def delete(name=name, outcomes=outcomes):
            try:
                await plane.templates.delete(world.principal, name)
                outcomes.append("deleted")
            except errors.InUse:
                outcomes.append("in use")

        async with trio.open_nursery() as nursery:
            for work in (create, delete) if number % 2 else (delete, create):
                nursery.start_soon(work)
        assert set(outcomes) in ({"running", "in use"}, {errors.NotFound, "deleted"})
    assert await world.disagreements() == []


async def test_deleted_between_two_looks_of_a_create(virtual_clock, world, freeze, start, monkeypatch):
    """Found, and its copies are gone already: 404, as for one that never was."""
    template, hosts_of = await freeze(), templates.hosts_of

    async def late(tx, one, **options):
        await tx.execute("update templates set deleted_at = now() where id = $1", template.id)
        await tx.execute("delete from template_hosts")
        return await hosts_of(tx, one, **options)

    monkeypatch.setattr(templates, "hosts_of", late)
    with pytest.raises(errors.NotFound):
        await start()


async def test_deleted_while_a_host_is_away(virtual_clock, world, agent, plane, freeze, nursery):
    """The name is free at once; the copy goes when the host is back, with the monitor, also after restarts."""
    nursery.start_soon(world.beat)
    template = await freeze()
    agent.cut_off()
    await plane.templates.delete(world.principal, "mine")
    assert list(agent.snapshots) == [str(template.id)]
    await world.control_plane(monitor=True)
    await trio.sleep(120)
    assert len(await world.sql("select 1 from template_hosts")) == 1
    agent.faults["snapshot.remove"] = [Fault(FaultCode.BUSY, "later", retryable=True)] * 2
    agent.come_back()
    await world.settle(seconds=120)
    assert agent.snapshots == {}
    assert await world.sql("select 1 from template_hosts") == []


async def test_one_whose_copy_vanished(virtual_clock, world, agent, plane, freeze, start):
    """The host answers that it does not have it: typed, and the sandbox's row says why."""
    await freeze()
    agent.snapshots.clear()
    with pytest.raises(errors.SnapshotDamaged, match="no such snapshot"):
        await start()
    (row,) = [row for row in (await world.rows()).values() if row.template == "mine"]
    assert row.status == "error"


async def test_a_template_of_a_child(virtual_clock, world, agent, plane, freeze, start):
    """Templates of sandboxes from templates: each depends on what it was made from only while that lives."""
    await freeze()
    child = await start()
    grandchild = await freeze("second", of=child.id)
    await plane.sandboxes.destroy(world.principal, child.id)
    await plane.templates.delete(world.principal, "mine")
    assert list(agent.snapshots) == [str(grandchild.id)]
    assert UUID(agent.made_from[str((await start("second")).id)]) == grandchild.id


async def test_the_team_is_deleted_meanwhile(virtual_clock, world, agent, plane, sandbox, freeze):
    """403 `no_team`; nothing is left on the host."""
    gate = agent.hold("snapshot.create")
    async with trio.open_nursery() as nursery:

        async def refused():
            with pytest.raises(errors.NoTeam):
                await freeze()

        nursery.start_soon(refused)
        await agent.reached["snapshot.create"].wait()
        await world.sql("update teams set deleted_at = now() where id = $1", world.principal.team_id)
        gate.set()
    assert agent.snapshots == {}


async def test_labels_of_a_create_are_not_the_templates(virtual_clock, world, agent, freeze, start, plane):
    """Envs and time-out are the request's."""
    await freeze()
    request = CreateSandbox(template="mine", timeout_sec=9, metadata={"a": "b"}, envs={"K": "V"})
    view = await plane.sandboxes.create(world.principal, replace(request), None)
    (body,) = [body for method, body in agent.asked if body.get("sandbox_id") == str(view.id)]
    assert (body["envs"], body["timeout_sec"], body.get("keep_envs")) == ({"K": "V"}, 9, None)


async def test_its_host_is_deleted_before_it_is_written_down(
    virtual_clock, world, agent, plane, sandbox, freeze, monkeypatch
):
    """With the host its copy is gone: there is no template, and the key is good for another one."""
    made = Snapshots._freeze

    async def made_and_deleted(self, principal, plan):
        size = await made(self, principal, plan)
        session = Session(id=uuid4(), issued_at=world.now(), expires_at=world.now() + timedelta(hours=1))
        user = User(id=uuid4(), email="op@example.com", name="Op", session=session, permissions=frozenset({"hosts"}))
        await control._fleet(plane.sandboxes, None).delete(user, agent.host, force=True)
        return size

    monkeypatch.setattr(Snapshots, "_freeze", made_and_deleted)
    with pytest.raises(errors.HostUnavailable):
        await freeze(key="key")
    assert not await world.sql("select from templates where type = 'snapshot'")
    assert not await world.sql("select from idempotency_keys")
