"""Templates of the teams: their copies on hosts, and what depends on them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from uuid import UUID, uuid4

import pytest
import trio

from capsule.db.connection import Connection
from capsule.db.errors import ConstraintViolated
from capsule.db.pool import Database
from capsule.db.queries import sandboxes, templates
from capsule.db.queries.teams import TeamRow
from capsule.db.queries.templates import TemplateRow


@pytest.fixture
def snapshot(db: Database, team: TeamRow, host: UUID) -> Callable[[str], Awaitable[TemplateRow]]:
    """Makes templates of the team, with a copy on the host."""

    async def make(name: str) -> TemplateRow:
        insert = partial(
            templates.insert_snapshot,
            id=uuid4(),
            team_id=team.id,
            name=name,
            vcpus=2,
            memory_mb=512,
            disk_mb=1024,
            size_bytes=5,
            host_id=host,
        )
        return await db.transaction(insert)

    return make


async def test_a_snapshot_and_its_copies(
    db: Database, team: TeamRow, host: UUID, snapshot: Callable[[str], Awaitable[TemplateRow]]
):
    """Its name is the team's while it lives; copies are known until their host has removed them, lost ones, too."""
    row = await snapshot("mine")
    assert await db.run(templates.get_by_name, team.id, "mine") == row
    with pytest.raises(ConstraintViolated, match="templates_name_key"):
        await snapshot("mine")
    assert await db.run(templates.hosts_of, row.id) == [host]
    for lost in (True, True, False):
        await db.run(partial(templates.mark_copy, lost=lost), row.id, host)
        (copy,) = await db.run(templates.copies_on, host)
        assert (copy.template_id, copy.wanted, copy.lost) == (row.id, True, lost)
        assert await db.run(templates.hosts_of, row.id) == ([] if lost else [host])
        assert await db.run(partial(templates.hosts_of, lost=True), row.id) == [host]
    await db.run(templates.forget_copy, row.id, host)  # of one that is wanted: nothing
    assert await db.run(templates.known_copies, host, [row.id, uuid4()]) == {row.id}
    await db.run(templates.mark_deleted, row.id)
    assert await db.run(templates.get_by_name, team.id, "mine") is None
    assert await db.run(templates.get_any, row.id) == row
    assert [copy.wanted for copy in await db.run(templates.copies_on, host)] == [False]
    await snapshot("mine")
    await db.run(templates.forget_copy, row.id, host)
    assert await db.run(templates.known_copies, host, [row.id]) == set()


async def test_deleting_and_depending_wait_for_each_other(
    db: Database, team: TeamRow, snapshot: Callable[[str], Awaitable[TemplateRow]]
):
    """Whoever holds it is finished before it is deleted; whoever comes later finds none."""
    row = await snapshot("mine")
    order: list[str] = []

    async def depend(tx: Connection) -> bool:
        held = await templates.hold(tx, row.id)
        order.append("held" if held else "gone")
        await tx.execute("select pg_sleep(0.2)")
        order.append("let go")
        return held

    async def delete(tx: Connection) -> None:
        assert await templates.take(tx, team.id, "mine") is not None
        order.append("taken")
        await templates.mark_deleted(tx, row.id)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(db.transaction, depend)
            while not order:
                await trio.sleep(0.01)
            nursery.start_soon(db.transaction, delete)
    assert order == ["held", "let go", "taken"]
    assert not await db.transaction(templates.hold, row.id)
    assert await db.transaction(templates.take, team.id, "mine") is None


async def test_a_host_that_was_emptied(
    db: Database, team: TeamRow, host: UUID, snapshot: Callable[[str], Awaitable[TemplateRow]]
):
    """Snapshots that were only there are none any more; base images stay."""
    await db.transaction(partial(templates.upsert_base, name="minimal", size_bytes=1))
    await snapshot("mine")
    await db.transaction(templates.forget_host, host)
    assert await db.run(templates.get_by_name, team.id, "mine") is None
    assert await db.run(templates.get_by_name, team.id, "minimal") is not None


async def test_who_uses_a_template(
    db: Database, team: TeamRow, soon: datetime, snapshot: Callable[[str], Awaitable[TemplateRow]]
):
    """Those that live or rest, oldest first."""
    row = await snapshot("mine")
    made = []
    for _ in range(2):
        insert = partial(
            sandboxes.insert,
            id=uuid4(),
            team_id=team.id,
            template="mine",
            template_id=row.id,
            vcpus=2,
            memory_mb=512,
            disk_mb=1024,
            timeout_sec=0,
            metadata={},
            transition_deadline=soon,
        )
        made.append(await db.transaction(insert))
    assert await db.run(sandboxes.using_template, row.id) == [one.id for one in made]
    end = partial(sandboxes.change_status, from_status="pending", generation=1, to_status="error")
    await db.transaction(end, made[0].id)
    assert await db.run(sandboxes.using_template, row.id) == [made[1].id]
