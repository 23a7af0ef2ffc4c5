"""Forking: children of a running sandbox, each there or with its reason, and never a snapshot left behind."""

from __future__ import annotations

import threading

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule import errors
from capsule.db.errors import DatabaseUnavailable
from capsule.model import CreateSandbox, CreateSnapshot, ForkFailure
from capsule.sandboxes.children import children, insert
from capsule.sandboxes.fork import AT_ONCE


@pytest.fixture
def fork(world, plane, sandbox):
    """Forks the sandbox."""

    async def fork(count=1, key=None, of=None, by=None):
        return await (by or plane).sandboxes.fork(world.principal, of or sandbox, count, key)

    return fork


async def test_children_run_beside_their_source(virtual_clock, world, agent, plane, sandbox, fork):
    """On its host, of its size, with its labels and envs, in the trail; the snapshot is gone when the answer comes."""
    await world.sql("""update sandboxes set metadata = '{"a": "b"}', timeout_sec = 7""")
    for _ in range(3):
        await world.add_host()
    children = await fork(3)
    source = await world.row(sandbox)
    for child in children:
        assert (child.status, child.host_id, child.template, child.metadata, child.timeout_sec) == (
            "running",
            agent.host,
            "minimal",
            {"a": "b"},
            7,
        )
    assert source.status == "running"
    assert agent.snapshots == {}
    (snapshot,) = {body["snapshot_id"] for method, body in agent.asked if method == "snapshot.create"}
    created = [body for method, body in agent.asked if method == "sandbox.create"]
    assert {(body["snapshot_id"], body["keep_envs"], body.get("envs")) for body in created} == {(snapshot, True, None)}
    assert len({body["hostname"] for body in created}) == 3
    audited = await world.sql("select metadata, resource_id from audit_logs where action = 'create'")
    assert {row["resource_id"] for row in audited} == {f"sb-{child.id}" for child in children}
    assert {row["metadata"]["fork_of"] for row in audited} == {f"sb-{sandbox}"}
    assert await world.disagreements() == []


@pytest.mark.parametrize("status", sorted(set(Status) - {"running"}))
async def test_only_a_running_one(virtual_clock, world, agent, plane, fork, status):
    """409 with its status, and nothing is asked of the host."""
    row = await world.insert(agent, status)
    with pytest.raises(errors.InvalidState) as caught:
        await fork(of=row.id)
    assert caught.value.extra == {"status": status}
    assert agent.asked == []


async def test_the_quota_counts_all_of_them(virtual_clock, world, agent, fork):
    """403 before anything is begun."""
    await world.sql("update teams set max_sandboxes = 3 where id = $1", world.principal.team_id)
    with pytest.raises(errors.QuotaExceeded) as caught:
        await fork(3)
    assert caught.value.extra == {"limit": "max_sandboxes"}
    assert agent.asked == []
    assert len(await fork(2)) == 2


async def test_there_has_to_be_room_for_all(virtual_clock, world, agent, fork):
    """503 that names the limit, before anything is begun; others' room does not help."""
    await world.add_host()
    await world.sql("update hosts set memory_mb = 4 * 640 where id = $1", agent.host)
    with pytest.raises(errors.NoHostsAvailable, match="2560 MiB of memory"):
        await fork(4)
    assert agent.asked == []
    assert len(await fork(3)) == 3


async def test_some_fail(virtual_clock, world, agent, fork):
    """Each item in the place of its child; rows of failed ones are `error` with the reason, the snapshot is gone."""
    agent.faults["sandbox.create"] = [
        Fault(FaultCode.DISK_FULL, "no room left"),
        None,
        Fault(FaultCode.INTERNAL, "bug"),
    ]
    items = await fork(3)
    assert sorted(item.code for item in items if isinstance(item, ForkFailure)) == ["disk_full", "host_unavailable"]
    assert [item.status for item in items if not isinstance(item, ForkFailure)] == ["running"]
    statuses = sorted(row.status for row in (await world.rows()).values())
    assert statuses == ["error", "error", "running", "running"]
    assert await world.disagreements() == []


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(FaultCode.DISK_FULL, "no room"), errors.DiskFull),
        (Fault(FaultCode.INVALID_STATE, "it is stopping", details={"status": "stopping"}), errors.InvalidState),
        (Fault(FaultCode.INTERNAL, "bug"), errors.HostUnavailable),
    ],
)
async def test_the_snapshot_fails(virtual_clock, world, agent, sandbox, fork, fault, error):
    """Nothing was begun: no row, no key used; the source runs on."""
    agent.faults["snapshot.create"] = fault
    with pytest.raises(error):
        await fork(3, key="key")
    assert list(await world.rows()) == [sandbox]
    assert await world.sql("select 1 from idempotency_keys") == []
    agent.faults.clear()
    assert len(await fork(3, key="key")) == 3


async def test_not_more_than_some_start_at_once(virtual_clock, world, agent, fork):
    """A hundred children, eight at a time, in time."""
    agent.delay = 1
    most = 0
    create = agent._create

    async def counted(body):
        nonlocal most
        most = max(most, sum(vm["status"] == "starting" for vm in agent.vms.values()) + 1)
        return await create(body)

    agent._create = counted
    items = await fork(100)
    assert {item.status for item in items} == {"running"}
    assert len({item.id for item in items}) == 100
    assert most == AT_ONCE


async def test_repeated_with_its_key(virtual_clock, world, agent, plane, fork):
    """The same children in the same order, at once and over two control planes; another number is 409."""
    other = await world.control_plane()
    agent.delay = 2
    answers = []

    async def one(by):
        answers.append(await fork(4, key="key", by=by))

    async with trio.open_nursery() as nursery:
        for by in (plane, other) * 2:
            nursery.start_soon(one, by)
    answers.append(await fork(4, key="key"))
    assert [[item.id for item in items] for items in answers] == [[item.id for item in answers[0]]] * 5
    assert len(agent.vms) == 5
    assert agent.snapshots == {}
    with pytest.raises(errors.IdempotencyKeyReused):
        await fork(5, key="key")


async def test_a_repeat_asks_seldom(virtual_clock, world, agent, sandbox, fork):
    """One statement at a time for all children, and fewer the longer it takes."""
    statements = []

    class Counting:
        def __getattr__(self, name):
            return getattr(world.db, name)

        async def run(self, fn, *args):
            async def counted(connection, *args):
                class Counted:
                    def __getattr__(self, name):
                        statements.append(name)
                        return getattr(connection, name)

                return await fn(Counted(), *args)

            return await world.db.run(counted if fn is children else fn, *args)

    other = await world.control_plane(db=Counting())
    agent.delay = 60
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fork, 4, "key")
        await trio.sleep(61)
        assert [item.status for item in await fork(4, key="key", by=other)] == ["running"] * 4
    assert 10 < len(statements) < 40


async def test_a_repeat_tells_of_failures_too(virtual_clock, world, agent, fork):
    """In the words of the rows."""
    agent.faults["sandbox.create"] = [Fault(FaultCode.DISK_FULL, "no room left")]
    await fork(2, key="key")
    items = await fork(2, key="key")
    assert [item.message for item in items if isinstance(item, ForkFailure)] == ["no room left"]


async def test_the_source_is_destroyed_meanwhile(virtual_clock, world, agent, plane, sandbox, fork):
    """After the snapshot: the children start all the same; before it: 409, and nothing is left."""
    gate = agent.hold("sandbox.create")
    answers = []

    async def run():
        answers.append(await fork(2))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await agent.reached["sandbox.create"].wait()
        await plane.sandboxes.destroy(world.principal, sandbox)
        gate.set()
    assert [item.status for item in answers[0]] == ["running"] * 2
    assert await world.disagreements() == []


async def test_the_client_goes_away(virtual_clock, world, agent, plane, sandbox, fork):
    """The children come all the same, and the snapshot goes."""
    agent.delay = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fork, 3)
        await trio.sleep(1.5)
        nursery.cancel_scope.cancel()
    with trio.fail_after(30):
        while plane.operations.running():
            await trio.sleep(0.1)
    assert len(agent.vms) == 4
    assert await world.disagreements() == []


async def test_the_control_plane_dies_half_way(virtual_clock, world, agent, plane, sandbox, fork, nursery):
    """Children that were made run, the others are ended in their time; the snapshot is collected after the grace; a
    repeat with the key tells what became of them."""
    nursery.start_soon(world.beat)
    create = agent._create

    async def some(body):
        if len(agent.vms) >= 3:
            await trio.sleep_forever()
        return await create(body)

    agent._create = some
    async with trio.open_nursery() as client:
        client.start_soon(fork, 4, "key")
        with trio.fail_after(30):
            while len(agent.vms) < 3:
                await trio.sleep(0.1)
        plane.kill()
        client.cancel_scope.cancel()
    assert len(agent.snapshots) == 1
    other = await world.control_plane(monitor=True)
    items = await fork(4, key="key", by=other)
    assert sorted(getattr(item, "status", "failed") for item in items) == ["failed"] * 2 + ["running"] * 2
    await world.settle(seconds=1200)
    assert agent.snapshots == {}


@pytest.mark.parametrize("key", ["key", None])
async def test_a_commit_that_comes_late(virtual_clock, world, agent, sandbox, nursery, monkeypatch, fork, key):
    """The database is given up on, and commits beside the next try: its children are ours, and all start."""
    monkeypatch.setattr("capsule.sandboxes.rows.SETTLE_PAUSE", 0)
    written = threading.Event()

    class Late:
        def __getattr__(self, name):
            return getattr(world.db, name)

        async def transaction(self, fn, *args):
            if fn is not insert or written.is_set():
                return await world.db.transaction(fn, *args)

            async def slow(tx, *args):
                await fn(tx, *args)
                written.set()
                await tx.execute("select pg_sleep(0.5)")

            nursery.start_soon(world.db.transaction, slow, *args)
            await trio.to_thread.run_sync(written.wait)
            raise DatabaseUnavailable("no answer")

    items = await fork(2, key=key, by=await world.control_plane(db=Late()))
    assert [item.status for item in items] == ["running"] * 2
    assert len(agent.vms) == 3
    assert await world.disagreements() == []


async def test_a_fork_of_a_child_of_a_template(virtual_clock, world, agent, plane, sandbox, fork):
    """It depends on the template as its source does."""

    await plane.templates.create(world.principal, CreateSnapshot(sandbox=sandbox, name="mine"), None)
    request = CreateSandbox(template="mine", timeout_sec=0, metadata={}, envs={})
    source = await plane.sandboxes.create(world.principal, request, None)
    (child,) = await fork(of=source.id)
    await plane.sandboxes.destroy(world.principal, source.id)
    with pytest.raises(errors.InUse) as caught:
        await plane.templates.delete(world.principal, "mine")
    assert caught.value.extra == {"sandbox_ids": [f"sb-{child.id}"]}
