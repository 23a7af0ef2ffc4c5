"""Teams, their owners and limits."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

import secrets
from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, one, only

PLATFORM = UUID(int=0)
"""The platform team: owner of the base templates, made with the schema, without members, never deleted."""


class TeamRow(msgspec.Struct, frozen=True, kw_only=True):
    """A team; it lives while `deleted_at` is None."""

    id: UUID
    name: str
    slug: str
    is_byoc: bool
    created_at: datetime
    deleted_at: datetime | None


class TeamLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`max_sandboxes` counts the live ones of the team, `max_templates` its snapshots; the others bound a sandbox."""

    max_sandboxes: int
    max_templates: int
    max_vcpus: int
    max_memory_mb: int


_COLUMNS = columns(TeamRow)


async def insert(
    tx: Connection, *, name: str, owner_id: UUID, is_default: bool = False, is_byoc: bool = False
) -> TeamRow:
    """A new team with its owner's membership. `is_default`: where the owner lands at login.

    ConstraintViolated("memberships_one_default") when the owner has such a team already.
    """
    record = await tx.fetchrow(
        f"insert into teams (name, slug, is_byoc) values ($1, $2, $3) returning {_COLUMNS}",
        name,
        f"{secrets.token_hex(3)}-{secrets.token_hex(3)}",
        is_byoc,
    )
    team = only(TeamRow, record)
    await tx.execute(
        "insert into memberships (team_id, user_id, role, is_default) values ($1, $2, 'owner', $3)",
        team.id,
        owner_id,
        is_default,
    )
    return team


async def get(tx: Connection, team_id: UUID) -> TeamRow | None:
    """By id, deleted or not."""
    return one(TeamRow, await tx.fetchrow(f"select {_COLUMNS} from teams where id = $1", team_id))


async def limits(tx: Connection, team_id: UUID) -> TeamLimits | None:
    """Of a team that lives."""
    record = await tx.fetchrow(f"select {columns(TeamLimits)} from teams where id = $1 and deleted_at is null", team_id)
    return one(TeamLimits, record)
