"""What each query of sandboxes promises to those who build on it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID, uuid4

from capsule.db.connection import Connection
from capsule.db.pool import Database
from capsule.db.queries import sandboxes
from capsule.db.queries.sandboxes import SandboxRow
from capsule.db.queries.teams import TeamRow
from tests.db.rivals import together

MakeSandbox = Callable[[], Awaitable[SandboxRow]]


async def _run(db: Database, row: SandboxRow, host: UUID, soon: datetime) -> SandboxRow:
    """Bring a pending sandbox to running."""

    async def move(tx: Connection) -> SandboxRow:
        starting = await sandboxes.change_status(
            tx,
            row.id,
            from_status="pending",
            generation=1,
            to_status="starting",
            host_id=host,
            transition_deadline=soon,
        )
        assert starting is not None
        running = await sandboxes.change_status(
            tx, row.id, from_status="starting", generation=2, to_status="running", host_ip="10.11.0.4"
        )
        assert running is not None
        return running

    return await db.transaction(move)


async def test_a_sandbox_comes_back_as_it_was_put(db: Database, sandbox: MakeSandbox, team: TeamRow):
    """Every field of a new row, by team and by id; another team does not see it."""
    row = await sandbox()
    assert (row.status, row.generation, row.metadata, row.host_id, row.host_ip) == (
        "pending",
        1,
        {"a": "1"},
        None,
        None,
    )
    assert row.created_at.tzinfo is not None
    assert await db.run(sandboxes.get, team.id, row.id) == row
    assert await db.run(sandboxes.get_any, row.id) == row
    assert await db.run(sandboxes.get, uuid4(), row.id) is None


async def test_a_change_of_status_is_compare_and_set(db: Database, sandbox: MakeSandbox, host: UUID, soon: datetime):
    """Ten rivals, one wins, the others get None; a late answer with an old generation writes nothing."""
    row = await sandbox()

    def rival(_n: int) -> Awaitable[SandboxRow | None]:
        change = partial(
            sandboxes.change_status,
            from_status="pending",
            generation=1,
            to_status="starting",
            host_id=host,
            transition_deadline=soon,
        )
        return db.transaction(change, row.id)

    results = await together(10, rival)
    assert len([result for result in results if result is not None]) == 1
    late = partial(sandboxes.change_status, from_status="starting", generation=1, to_status="error")
    assert await db.transaction(late, row.id) is None


async def test_times_and_address_follow_the_status(db: Database, sandbox: MakeSandbox, host: UUID, soon: datetime):
    """started_at is the first start, the address goes at rest, the reason is of the latest change."""
    running = await _run(db, await sandbox(), host, soon)
    assert running.started_at is not None
    assert running.last_active_at is not None
    assert (running.host_ip, running.host_id, running.transition_deadline) == ("10.11.0.4", host, None)

    async def rest_and_go_on(tx: Connection) -> tuple[SandboxRow, SandboxRow]:
        change = partial(sandboxes.change_status, tx, running.id)
        await change(from_status="running", generation=3, to_status="pausing", transition_deadline=soon, reason="idle")
        paused = await change(from_status="pausing", generation=4, to_status="paused", reason="idle")
        await change(from_status="paused", generation=5, to_status="resuming", transition_deadline=soon)
        again = await change(from_status="resuming", generation=6, to_status="running", host_ip="10.11.0.9")
        assert paused is not None
        assert again is not None
        return paused, again

    paused, again = await db.transaction(rest_and_go_on)
    assert (paused.host_ip, paused.reason) == (None, "idle")
    assert (again.host_ip, again.reason, again.started_at) == ("10.11.0.9", None, running.started_at)


async def test_pages_are_complete_and_newest_first(db: Database, sandbox: MakeSandbox, team: TeamRow):
    """Rows made in one instant are not dropped between pages; finished ones show only when asked for."""
    made = [await sandbox() for _ in range(7)]
    one_instant = "update sandboxes set created_at = $1 where id = $2"

    async def same_time(tx: Connection) -> None:
        await tx.execute("alter table sandboxes disable trigger sandboxes_identity")
        for row in made[:4]:
            await tx.execute(one_instant, made[0].created_at, row.id)
        await tx.execute("alter table sandboxes enable trigger sandboxes_identity")

    await db.transaction(same_time)
    seen: list[SandboxRow] = []
    while True:
        before = (seen[-1].created_at, seen[-1].id) if seen else None
        page = await db.run(partial(sandboxes.list_page, statuses=None, limit=2, before=before), team.id)
        if not page:
            break
        seen += page
    assert {row.id for row in seen} == {row.id for row in made}
    assert [(row.created_at, row.id) for row in seen] == sorted(((r.created_at, r.id) for r in seen), reverse=True)
    end = partial(sandboxes.change_status, from_status="pending", generation=1, to_status="error")
    await db.transaction(end, made[0].id)
    listed = partial(sandboxes.list_page, limit=50, before=None)
    assert len(await db.run(partial(listed, statuses=None), team.id)) == 6
    assert [row.id for row in await db.run(partial(listed, statuses=["error"]), team.id)] == [made[0].id]
    assert await db.run(partial(listed, statuses=[]), team.id) == []


async def test_touch_is_written_once_a_second_and_only_while_running(
    db: Database, sandbox: MakeSandbox, host: UUID, soon: datetime
):
    """A stream of pings costs one write a second; a sandbox that does not run is not woken up."""
    pending = await sandbox()
    await db.run(sandboxes.touch, pending.id)
    row = await db.run(sandboxes.get_any, pending.id)
    assert row is not None
    assert row.last_active_at is None
    running = await _run(db, pending, host, soon)

    async def touch_once_used(tx: Connection, seconds: float) -> tuple[datetime, datetime, bool]:
        """Touch one last used so long ago: when that was, what is noted now, and whether it was not due yet."""
        back = """update sandboxes set last_active_at = clock_timestamp() - $2::interval where id = $1
                  returning last_active_at"""
        used = await tx.fetchval(back, running.id, timedelta(seconds=seconds))
        await sandboxes.touch(tx, running.id)
        look = "select last_active_at, clock_timestamp() - $2 < interval '1 second' from sandboxes where id = $1"
        noted, in_time = await tx.fetchrow(look, running.id, used)
        return used, noted, in_time

    for _ in range(50):
        used, noted, in_time = await db.run(touch_once_used, 0.5)
        if in_time:
            break
    assert in_time
    assert noted == used
    used, noted, _ = await db.run(touch_once_used, 2.0)
    assert noted >= used + timedelta(seconds=2)
    row = await db.run(sandboxes.get_any, running.id)
    assert row is not None
    assert row.last_updated == running.last_updated


async def test_hosts_know_their_sandboxes_and_what_they_hold(
    db: Database, sandbox: MakeSandbox, host: UUID, soon: datetime
):
    """Paused ones hold disk, and their vcpus and memory are told apart; finished ones hold nothing."""
    rows = [await _run(db, await sandbox(), host, soon) for _ in range(3)]

    async def pause_one_end_one(tx: Connection) -> None:
        change = partial(sandboxes.change_status, tx)
        await change(rows[0].id, from_status="running", generation=3, to_status="pausing", transition_deadline=soon)
        await change(rows[0].id, from_status="pausing", generation=4, to_status="paused")
        await change(rows[1].id, from_status="running", generation=3, to_status="error")

    await db.transaction(pause_one_end_one)
    assert [row.id for row in await db.run(sandboxes.on_host, host)] == [rows[0].id, rows[2].id]
    (held,) = await db.run(sandboxes.reserved_by_host)
    assert held == sandboxes.HostReservation(
        host_id=host, vcpus=2, memory_mb=512, disk_mb=2048, sandboxes=2, paused_vcpus=2, paused_memory_mb=512
    )


async def test_overdue_finds_exactly_rows_past_their_deadline(db: Database, sandbox: MakeSandbox, soon: datetime):
    """A pending row nobody looks after turns up once its deadline has passed."""
    row = await sandbox()
    assert await db.run(sandboxes.overdue, soon) == []
    assert await db.run(sandboxes.overdue, soon + timedelta(seconds=1)) == [row]


async def test_what_only_its_host_can_end_is_not_in_the_way(
    db: Database, sandbox: MakeSandbox, soon: datetime, host: UUID
):
    """However many rows wait for a host that is away, they take no place in the list; one without a host does."""

    async def step(row: SandboxRow, to_status: str, host_id: UUID | None = None) -> SandboxRow:
        changed = await db.transaction(
            partial(
                sandboxes.change_status,
                from_status=row.status,
                generation=row.generation,
                to_status=to_status,
                host_id=host_id,
                transition_deadline=None if to_status in {"running", "paused"} else soon,
            ),
            row.id,
        )
        assert changed is not None
        return changed

    nowhere = await step(await sandbox(), "stopping")
    starting = await step(await sandbox(), "starting", host)
    ways = (["stopping"], ["running", "pausing"], ["running", "pausing", "paused", "resuming"])
    for way in ways:
        row = await step(await sandbox(), "starting", host)
        for to_status in way:
            row = await step(row, to_status)
    found = await db.run(sandboxes.overdue, soon + timedelta(seconds=1))
    assert {row.id for row in found} == {nowhere.id, starting.id}


async def test_counting_for_a_quota_is_one_after_the_other(db: Database, team: TeamRow, soon: datetime):
    """Ten creates at once under a limit of three make three sandboxes."""

    async def create(_n: int) -> bool:
        async def insert_if_allowed(tx: Connection) -> bool:
            if await sandboxes.count_live(tx, team.id) >= 3:
                return False
            await sandboxes.insert(
                tx,
                id=uuid4(),
                team_id=team.id,
                template="minimal",
                vcpus=1,
                memory_mb=1,
                disk_mb=1,
                timeout_sec=0,
                metadata={},
                transition_deadline=soon,
            )
            return True

        return await db.transaction(insert_if_allowed)

    assert sorted(await together(10, create)) == [False] * 7 + [True] * 3
    assert await db.transaction(sandboxes.count_live, team.id) == 3


async def test_handing_over_makes_overdue(db: Database, sandbox: MakeSandbox, soon: datetime):
    """Only the row as it was; never later than it was due."""
    row = await sandbox()
    await db.run(sandboxes.hand_over, row.id, row.generation + 1)
    assert await db.run(sandboxes.get_any, row.id) == row
    await db.run(sandboxes.hand_over, row.id, row.generation)
    (now,) = await db.run(sandboxes.overdue, datetime.now(UTC) + timedelta(seconds=1))
    assert (now.id, now.generation) == (row.id, row.generation)
