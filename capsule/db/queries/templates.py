"""What sandboxes start from: base images of the platform, frozen sandboxes of the teams."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, many, one, only
from capsule.db.queries.teams import PLATFORM


class TemplateRow(msgspec.Struct, frozen=True, kw_only=True):
    """A template that was not deleted. `vcpus` and `memory_mb` None: the sandbox chooses."""

    id: UUID
    team_id: UUID
    name: str
    type: str
    vcpus: int | None
    memory_mb: int | None
    size_bytes: int
    created_at: datetime

    @property
    def platform(self) -> bool:
        """Whether it is everyone's."""
        return self.team_id == PLATFORM


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
