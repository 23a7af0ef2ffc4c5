"""Sandboxes: the rows, their pages, and the one way to change a status."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, many, one, only


class SandboxRow(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox. `generation` grows by one with each change of status; times are aware, in UTC."""

    id: UUID
    team_id: UUID
    host_id: UUID | None
    template: str
    template_id: UUID | None
    vcpus: int
    memory_mb: int
    disk_mb: int
    timeout_sec: int
    status: str
    generation: int
    host_ip: str | None
    metadata: dict[str, str]
    reason: str | None
    created_at: datetime
    started_at: datetime | None
    last_active_at: datetime | None
    last_updated: datetime
    transition_deadline: datetime | None


class HostReservation(msgspec.Struct, frozen=True, kw_only=True):
    """What sandboxes hold on one host.

    `vcpus` and `memory_mb` are those of all live ones but the paused, whose own are in `paused_…`; `disk_mb` and
    `sandboxes` count paused ones too.
    """

    host_id: UUID
    vcpus: int
    memory_mb: int
    disk_mb: int
    sandboxes: int
    paused_vcpus: int
    paused_memory_mb: int


_COLUMNS = columns(SandboxRow)


async def insert(
    tx: Connection,
    *,
    id: UUID,  # noqa: A002 - the column's name
    team_id: UUID,
    template: str,
    vcpus: int,
    memory_mb: int,
    disk_mb: int,
    timeout_sec: int,
    metadata: Mapping[str, str],
    transition_deadline: datetime,
    template_id: UUID | None = None,
) -> SandboxRow:
    """A new `pending` sandbox of generation 1. ConstraintViolated("sandboxes_team_alive") when its team is gone."""
    record = await tx.fetchrow(
        f"""
        insert into sandboxes (id, team_id, template, template_id, vcpus, memory_mb, disk_mb, timeout_sec, metadata,
                               transition_deadline)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
        returning {_COLUMNS}
        """,
        id,
        team_id,
        template,
        template_id,
        vcpus,
        memory_mb,
        disk_mb,
        timeout_sec,
        dict(metadata),
        transition_deadline,
    )
    return only(SandboxRow, record)


async def get(tx: Connection, team_id: UUID, sandbox_id: UUID) -> SandboxRow | None:
    """A sandbox of this team, in whatever status."""
    return one(
        SandboxRow,
        await tx.fetchrow(f"select {_COLUMNS} from sandboxes where id = $1 and team_id = $2", sandbox_id, team_id),
    )


async def get_any(tx: Connection, sandbox_id: UUID) -> SandboxRow | None:
    """A sandbox of any team: for the system itself."""
    return one(SandboxRow, await tx.fetchrow(f"select {_COLUMNS} from sandboxes where id = $1", sandbox_id))


async def get_many(tx: Connection, ids: Collection[UUID]) -> dict[UUID, SandboxRow]:
    """Those of these that there are, of any team."""
    records = await tx.fetch(f"select {_COLUMNS} from sandboxes where id = any($1)", list(ids))
    return {row.id: row for row in many(SandboxRow, records)}


async def list_page(
    tx: Connection,
    team_id: UUID,
    *,
    statuses: Collection[str] | None,
    limit: int,
    before: tuple[datetime, UUID] | None,
) -> list[SandboxRow]:
    """At most `limit` sandboxes, newest first, strictly older than the position `before` = (created_at, id).

    `statuses` None: all but stopped and error.
    """
    chosen = "status not in ('stopped', 'error')" if statuses is None else "status = any($5::text[])"
    parameters: list[Any] = [team_id, limit, *(before or (None, None))]
    if statuses is not None:
        parameters.append(list(statuses))
    records = await tx.fetch(
        f"""
        select {_COLUMNS} from sandboxes
        where team_id = $1 and {chosen}
          and ($3::timestamptz is null or (created_at, id) < ($3::timestamptz, $4::uuid))
        order by created_at desc, id desc limit $2
        """,
        *parameters,
    )
    return many(SandboxRow, records)


async def change_status(
    tx: Connection,
    sandbox_id: UUID,
    *,
    from_status: str,
    generation: int,
    to_status: str,
    transition_deadline: datetime | None = None,
    host_id: UUID | None = None,
    host_ip: str | None = None,
    reason: str | None = None,
) -> SandboxRow | None:
    """Compare-and-set: the row as it is now, or None when it was no longer (`from_status`, `generation`).

    `transition_deadline` is needed exactly for a status on the way (pending, starting, pausing, resuming, stopping).
    `host_id` and `host_ip` None: as they are, but the address goes with paused, stopped and error. `reason` replaces
    the old one. Becoming running sets last_active_at, and started_at the first time. ConstraintViolated names what is
    impossible, such as `sandboxes_transition`.
    """
    record = await tx.fetchrow(
        f"""
        update sandboxes set
          status = $4, generation = generation + 1, transition_deadline = $5, reason = $8,
          host_id = coalesce($6, host_id),
          host_ip = case when $4 in ('paused', 'stopped', 'error') then null else coalesce($7, host_ip) end,
          started_at = case when $4 = 'running' then coalesce(started_at, clock_timestamp()) else started_at end,
          last_active_at = case when $4 = 'running' then clock_timestamp() else last_active_at end,
          last_updated = clock_timestamp()
        where id = $1 and status = $2 and generation = $3
        returning {_COLUMNS}
        """,
        sandbox_id,
        from_status,
        generation,
        to_status,
        transition_deadline,
        host_id,
        host_ip,
        reason,
    )
    return one(SandboxRow, record)


async def move(tx: Connection, sandbox_id: UUID, generation: int, host_id: UUID) -> SandboxRow | None:
    """A row that is starting goes to another host, within its deadline: compare-and-set, and the same when it is done
    once more. None when the row has changed otherwise. ConstraintViolated("sandboxes_live_host")."""
    record = await tx.fetchrow(
        f"""
        update sandboxes set host_id = $3, generation = generation + 1, last_updated = clock_timestamp()
        where id = $1 and status = 'starting' and generation = $2
        returning {_COLUMNS}
        """,
        sandbox_id,
        generation,
        host_id,
    )
    return only(SandboxRow, record) if record is not None else await moved(tx, sandbox_id, generation, host_id)


async def moved(tx: Connection, sandbox_id: UUID, generation: int, host_id: UUID) -> SandboxRow | None:
    """The row, if this very move was done before."""
    now = await get_any(tx, sandbox_id)
    done = now is not None and (now.status, now.generation, now.host_id) == ("starting", generation + 1, host_id)
    return now if done else None


async def correct_address(tx: Connection, sandbox_id: UUID, generation: int, host_ip: str) -> None:
    """It runs under another address than was written down; nothing when the row has changed since."""
    await tx.execute(
        "update sandboxes set host_ip = $3 where id = $1 and generation = $2 and status = 'running'",
        sandbox_id,
        generation,
        host_ip,
    )


async def hand_over(tx: Connection, sandbox_id: UUID, generation: int) -> None:
    """Nobody works on this row any more: whoever looks after overdue ones may, at once."""
    await tx.execute(
        """
        update sandboxes set transition_deadline = least(transition_deadline, clock_timestamp())
        where id = $1 and generation = $2 and transition_deadline is not null
        """,
        sandbox_id,
        generation,
    )


async def using_template(tx: Connection, template_id: UUID) -> list[UUID]:
    """Sandboxes that live or rest and were made from this template, oldest first; at most 1000."""
    records = await tx.fetch(
        """
        select id from sandboxes where template_id = $1 and status not in ('stopped', 'error')
        order by created_at, id limit 1000
        """,
        template_id,
    )
    return [record["id"] for record in records]


async def touch(tx: Connection, sandbox_id: UUID) -> None:
    """The sandbox was used now. Written at most once a second, and only while it runs."""
    await tx.execute(
        """
        update sandboxes set last_active_at = clock_timestamp()
        where id = $1 and status = 'running'
          and (last_active_at is null or last_active_at < clock_timestamp() - interval '1 second')
        """,
        sandbox_id,
    )


async def on_host(tx: Connection, host_id: UUID) -> list[SandboxRow]:
    """All sandboxes that live or rest on the host, oldest first."""
    return many(
        SandboxRow,
        await tx.fetch(
            f"""
            select {_COLUMNS} from sandboxes
            where host_id = $1 and status not in ('stopped', 'error') order by created_at, id
            """,
            host_id,
        ),
    )


async def overdue(tx: Connection, now: datetime) -> list[SandboxRow]:
    """Rows that nobody but the monitor can end, past their deadline, the longest overdue first; at most 1000.

    Of the others (stopping, pausing, resuming on a host) only the host knows what became of them: its follower asks.
    """
    return many(
        SandboxRow,
        await tx.fetch(
            f"""
            select {_COLUMNS} from sandboxes
            where transition_deadline < $1 and (status in ('pending', 'starting') or host_id is null)
            order by transition_deadline limit 1000
            """,
            now,
        ),
    )


async def count_live(tx: Connection, team_id: UUID) -> int:
    """How many sandboxes the team has that are not over, with the team's row locked until the transaction ends.

    So of two creates at the limit one waits for the other and then counts it.
    """
    await tx.execute("select from teams where id = $1 for no key update", team_id)
    count: int = await tx.fetchval(
        "select count(*) from sandboxes where team_id = $1 and status not in ('stopped', 'error')", team_id
    )
    return count


async def reserved_by_host(tx: Connection) -> list[HostReservation]:
    """For every host with live or resting sandboxes."""
    return many(
        HostReservation,
        await tx.fetch(
            """
            select host_id,
              coalesce(sum(vcpus) filter (where status <> 'paused'), 0)::int as vcpus,
              coalesce(sum(memory_mb) filter (where status <> 'paused'), 0)::int as memory_mb,
              sum(disk_mb)::int as disk_mb,
              count(*)::int as sandboxes,
              coalesce(sum(vcpus) filter (where status = 'paused'), 0)::int as paused_vcpus,
              coalesce(sum(memory_mb) filter (where status = 'paused'), 0)::int as paused_memory_mb
            from sandboxes
            where status not in ('stopped', 'error') and host_id is not null
            group by host_id
            """
        ),
    )


async def transitions(tx: Connection) -> frozenset[tuple[str, str]]:
    """The allowed changes of status, as the database has them."""
    records = await tx.fetch("select from_status, to_status from sandbox_transitions")
    return frozenset((record["from_status"], record["to_status"]) for record in records)
