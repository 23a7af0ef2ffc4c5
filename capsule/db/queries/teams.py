"""Teams: their rows, limits, and whose they are."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

import secrets
from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, many, one, only

PLATFORM = UUID(int=0)
"""The platform team: owner of the base templates, made with the schema, without members, never deleted."""

SLUG_ATTEMPTS = 5
"""48 random bits: taken by chance once in 280 million, when there are a million teams."""


class TeamRow(msgspec.Struct, frozen=True, kw_only=True):
    """A team; it lives while `deleted_at` is None."""

    id: UUID
    name: str
    slug: str
    is_byoc: bool
    max_members: int
    created_at: datetime
    deleted_at: datetime | None


class TeamOfUser(msgspec.Struct, frozen=True, kw_only=True):
    """A team that lives, and the role that the asker has in it."""

    id: UUID
    name: str
    slug: str
    is_byoc: bool
    created_at: datetime
    role: str


class TeamLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`max_sandboxes` counts the live ones of the team, `max_templates` its snapshots; the others bound a sandbox."""

    max_sandboxes: int
    max_templates: int
    max_vcpus: int
    max_memory_mb: int


_COLUMNS = columns(TeamRow)
_COLUMNS_OF_USER = columns(TeamOfUser, "t").replace("t.role", "m.role")


async def insert(
    tx: Connection, *, name: str, owner_id: UUID, is_default: bool = False, is_byoc: bool = False
) -> TeamRow:
    """A new team with its owner's membership. `is_default`: where the owner lands at login.

    ConstraintViolated("memberships_one_default") when the owner has such a team already.
    """
    team = await _insert(tx, name, is_byoc=is_byoc)
    await tx.execute(
        "insert into memberships (team_id, user_id, role, is_default) values ($1, $2, 'owner', $3)",
        team.id,
        owner_id,
        is_default,
    )
    return team


async def _insert(tx: Connection, name: str, *, is_byoc: bool) -> TeamRow:
    for _ in range(SLUG_ATTEMPTS):
        record = await tx.fetchrow(
            f"""
            insert into teams (name, slug, is_byoc) values ($1, $2, $3)
            on conflict (slug) do nothing returning {_COLUMNS}
            """,
            name,
            f"{secrets.token_hex(3)}-{secrets.token_hex(3)}",
            is_byoc,
        )
        if record is not None:
            return only(TeamRow, record)
    raise AssertionError(f"{SLUG_ATTEMPTS} random slugs were all taken")


async def get(tx: Connection, team_id: UUID) -> TeamRow | None:
    """By id, deleted or not."""
    return one(TeamRow, await tx.fetchrow(f"select {_COLUMNS} from teams where id = $1", team_id))


async def limits(tx: Connection, team_id: UUID) -> TeamLimits | None:
    """Of a team that lives."""
    record = await tx.fetchrow(f"select {columns(TeamLimits)} from teams where id = $1 and deleted_at is null", team_id)
    return one(TeamLimits, record)


async def is_byoc(tx: Connection, team_id: UUID) -> bool:
    """Whether the team brings its own hosts, and uses no others."""
    return bool(await tx.fetchval("select is_byoc from teams where id = $1", team_id))


async def lock(tx: Connection, team_id: UUID) -> TeamRow | None:
    """A team that lives, locked until the transaction ends: nobody joins, leaves, changes a role, renames or deletes
    it, or makes a sandbox for it meanwhile."""
    record = await tx.fetchrow(
        f"select {_COLUMNS} from teams where id = $1 and deleted_at is null for no key update", team_id
    )
    return one(TeamRow, record)


async def of_user(tx: Connection, user_id: UUID, team_id: UUID) -> TeamOfUser | None:
    """A team that lives and that the user is a member of."""
    record = await tx.fetchrow(
        f"""
        select {_COLUMNS_OF_USER} from memberships m join teams t on t.id = m.team_id
        where m.user_id = $1 and m.team_id = $2 and t.deleted_at is null
        """,
        user_id,
        team_id,
    )
    return one(TeamOfUser, record)


async def page_of_user(
    tx: Connection, user_id: UUID, *, limit: int, before: tuple[datetime, UUID] | None
) -> list[TeamOfUser]:
    """At most `limit` of the user's teams that live, newest first, older than `before` = (created_at, id)."""
    records = await tx.fetch(
        f"""
        select {_COLUMNS_OF_USER} from memberships m join teams t on t.id = m.team_id
        where m.user_id = $1 and t.deleted_at is null
          and ($3::timestamptz is null or (t.created_at, t.id) < ($3::timestamptz, $4::uuid))
        order by t.created_at desc, t.id desc limit $2
        """,
        user_id,
        limit,
        *(before or (None, None)),
    )
    return many(TeamOfUser, records)


async def count_owned(tx: Connection, user_id: UUID) -> int:
    """How many teams that live the user owns, with the user's row locked until the transaction ends: of two creates at
    the limit one waits for the other and then counts its team."""
    await tx.execute("select from users where id = $1 for no key update", user_id)
    count: int = await tx.fetchval(
        """
        select count(*) from memberships m join teams t on t.id = m.team_id
        where m.user_id = $1 and m.role = 'owner' and t.deleted_at is null
        """,
        user_id,
    )
    return count


async def rename(tx: Connection, team_id: UUID, name: str) -> None:
    """Another name; the slug stays."""
    await tx.execute("update teams set name = $2 where id = $1", team_id, name)


async def mark_deleted(tx: Connection, team_id: UUID) -> None:
    """It is no team any more. The row stays: its slug is never given out again."""
    await tx.execute("update teams set deleted_at = clock_timestamp() where id = $1 and deleted_at is null", team_id)
