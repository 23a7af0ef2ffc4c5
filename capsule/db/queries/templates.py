"""What sandboxes start from: base images of the platform, frozen sandboxes of the teams."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, many, one, only
from capsule.db.queries.teams import PLATFORM


class TemplateRow(msgspec.Struct, frozen=True, kw_only=True):
    """A template; of a snapshot the `id` is its hosts' name for it, too.

    `vcpus`, `memory_mb` and `disk_mb` None: the sandbox chooses.
    """

    id: UUID
    team_id: UUID
    name: str
    type: str
    vcpus: int | None
    memory_mb: int | None
    disk_mb: int | None
    size_bytes: int
    created_at: datetime

    @property
    def platform(self) -> bool:
        """Whether it is everyone's."""
        return self.team_id == PLATFORM


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """A host's copy of a snapshot. `wanted`: its template was not deleted; `lost`: the host said that it is gone."""

    template_id: UUID
    wanted: bool
    lost: bool


_COLUMNS = columns(TemplateRow)


async def upsert_base(tx: Connection, *, name: str, size_bytes: int) -> TemplateRow:
    """The platform's base image of this name, made or brought up to date."""
    record = await tx.fetchrow(
        f"""
        insert into templates (team_id, name, type, size_bytes) values ($1, $2, 'base', $3)
        on conflict (team_id, name) where deleted_at is null do update set size_bytes = excluded.size_bytes
        returning {_COLUMNS}
        """,
        PLATFORM,
        name,
        size_bytes,
    )
    return only(TemplateRow, record)


async def get_by_name(tx: Connection, team_id: UUID, name: str) -> TemplateRow | None:
    """The team's own template of this name, else the platform's."""
    record = await tx.fetchrow(
        f"""
        select {_COLUMNS} from templates
        where team_id in ($1, $2) and name = $3 and deleted_at is null
        order by team_id = $2 limit 1
        """,
        team_id,
        PLATFORM,
        name,
    )
    return one(TemplateRow, record)


async def list_page(
    tx: Connection,
    team_id: UUID,
    *,
    type: str | None,  # noqa: A002 - the column's name
    limit: int,
    before: tuple[datetime, UUID] | None,
) -> list[TemplateRow]:
    """At most `limit` of the platform's and the team's, newest first, older than `before` = (created_at, id)."""
    records = await tx.fetch(
        f"""
        select {_COLUMNS} from templates
        where team_id in ($1, $2) and deleted_at is null and ($3::text is null or type = $3)
          and ($5::timestamptz is null or (created_at, id) < ($5::timestamptz, $6::uuid))
        order by created_at desc, id desc limit $4
        """,
        team_id,
        PLATFORM,
        type,
        limit,
        *(before or (None, None)),
    )
    return many(TemplateRow, records)


async def insert_snapshot(
    tx: Connection,
    *,
    id: UUID,  # noqa: A002 - the column's name
    team_id: UUID,
    name: str,
    vcpus: int,
    memory_mb: int,
    disk_mb: int,
    size_bytes: int,
    host_id: UUID,
) -> TemplateRow:
    """A new template of the team, with its first copy. ConstraintViolated("templates_name_key") when the name is
    taken."""
    record = await tx.fetchrow(
        f"""
        insert into templates (id, team_id, name, type, vcpus, memory_mb, disk_mb, size_bytes)
        values ($1, $2, $3, 'snapshot', $4, $5, $6, $7) returning {_COLUMNS}
        """,
        id,
        team_id,
        name,
        vcpus,
        memory_mb,
        disk_mb,
        size_bytes,
    )
    await tx.execute("insert into template_hosts (template_id, host_id) values ($1, $2)", id, host_id)
    return only(TemplateRow, record)


async def count(tx: Connection, team_id: UUID) -> int:
    """How many templates the team has, with the team's row locked until the transaction ends: of two at the limit one
    waits for the other and then counts it."""
    await tx.execute("select from teams where id = $1 for no key update", team_id)
    number: int = await tx.fetchval("select count(*) from templates where team_id = $1 and deleted_at is null", team_id)
    return number


async def get_any(tx: Connection, template_id: UUID) -> TemplateRow | None:
    """A template of any team, deleted or not."""
    return one(TemplateRow, await tx.fetchrow(f"select {_COLUMNS} from templates where id = $1", template_id))


async def hold(tx: Connection, template_id: UUID) -> bool:
    """Keep the template from being deleted until the transaction ends; False when it was deleted already."""
    held = await tx.fetchval("select true from templates where id = $1 and deleted_at is null for share", template_id)
    return held is not None


async def take(tx: Connection, team_id: UUID, name: str) -> TemplateRow | None:
    """The team's own template of this name, locked until the transaction ends: no sandbox can start to depend on it."""
    record = await tx.fetchrow(
        f"select {_COLUMNS} from templates where team_id = $1 and name = $2 and deleted_at is null for update",
        team_id,
        name,
    )
    return one(TemplateRow, record)


async def mark_deleted(tx: Connection, template_id: UUID) -> None:
    """It is no template any more; its name is free. Copies stay known until their hosts have removed them."""
    await tx.execute(
        "update templates set deleted_at = clock_timestamp() where id = $1 and deleted_at is null", template_id
    )


async def hosts_of(tx: Connection, template_id: UUID, *, lost: bool = False) -> list[UUID]:
    """The hosts that have a copy; with `lost` those that lost theirs, too."""
    records = await tx.fetch(
        "select host_id from template_hosts where template_id = $1 and ($2 or lost_at is null) order by host_id",
        template_id,
        lost,
    )
    return [record["host_id"] for record in records]


async def copies_on(tx: Connection, host_id: UUID) -> list[Copy]:
    """Every copy that the host has or should have."""
    return many(
        Copy,
        await tx.fetch(
            """
            select c.template_id, t.deleted_at is null as wanted, c.lost_at is not null as lost
            from template_hosts c join templates t on t.id = c.template_id
            where c.host_id = $1 order by c.template_id
            """,
            host_id,
        ),
    )


async def known_copies(tx: Connection, host_id: UUID, ids: Collection[UUID]) -> set[UUID]:
    """Those of `ids` of which the host should have a copy, or has one that is to be removed."""
    records = await tx.fetch(
        "select template_id from template_hosts where host_id = $1 and template_id = any($2)", host_id, list(ids)
    )
    return {record["template_id"] for record in records}


async def mark_copy(tx: Connection, template_id: UUID, host_id: UUID, *, lost: bool) -> None:
    """What the host said of its copy."""
    await tx.execute(
        """
        update template_hosts set lost_at = case when $3 then clock_timestamp() end
        where template_id = $1 and host_id = $2 and (lost_at is not null) <> $3
        """,
        template_id,
        host_id,
        lost,
    )


async def forget_copy(tx: Connection, template_id: UUID, host_id: UUID) -> None:
    """The host has removed its copy of a deleted template."""
    await tx.execute(
        """
        delete from template_hosts c using templates t
        where c.template_id = $1 and c.host_id = $2 and t.id = c.template_id and t.deleted_at is not null
        """,
        template_id,
        host_id,
    )


async def forget_host(tx: Connection, host_id: UUID) -> None:
    """The host was emptied: its copies are gone, and with them every snapshot that is nowhere else."""
    await tx.execute("delete from template_hosts where host_id = $1", host_id)
    await tx.execute(
        """
        update templates t set deleted_at = clock_timestamp()
        where type = 'snapshot' and deleted_at is null
          and not exists (select from template_hosts c where c.template_id = t.id)
        """
    )
