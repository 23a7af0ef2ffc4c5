"""Memberships: who is in a team, as what, and since when.

Whoever changes one holds the lock on the team's row (`teams.lock`): so they come one after the other in each team, and
what was read under the lock holds until the transaction ends.
"""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, many, one


class MemberRow(msgspec.Struct, frozen=True, kw_only=True):
    """A person in a team."""

    user_id: UUID
    name: str
    email: str
    role: str
    joined_at: datetime


class FoundRow(msgspec.Struct, frozen=True, kw_only=True):
    """A person as others may find them."""

    user_id: UUID
    email: str
    name: str


class RevokedKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key that ended with its maker's membership."""

    id: UUID
    name: str


_COLUMNS = columns(MemberRow, "m").replace("m.name, m.email", "u.name, u.email")
_FOUND = columns(FoundRow).replace("user_id", "id as user_id")


async def lock_role(tx: Connection, team_id: UUID, user_id: UUID) -> str | None:
    """What the user is in the team, None for no member; it stays so until the transaction ends."""
    role: str | None = await tx.fetchval(
        "select role from memberships where team_id = $1 and user_id = $2 for share", team_id, user_id
    )
    return role


async def get(tx: Connection, team_id: UUID, user_id: UUID) -> MemberRow | None:
    """A member, or None."""
    record = await tx.fetchrow(
        f"""
        select {_COLUMNS} from memberships m join users u on u.id = m.user_id
        where m.team_id = $1 and m.user_id = $2
        """,
        team_id,
        user_id,
    )
    return one(MemberRow, record)


async def page(
    tx: Connection, team_id: UUID, *, limit: int | None = None, after: tuple[datetime, UUID] | None = None
) -> list[MemberRow]:
    """At most `limit` members (None: all), in the order they joined, after (joined_at, user_id)."""
    records = await tx.fetch(
        f"""
        select {_COLUMNS} from memberships m join users u on u.id = m.user_id
        where m.team_id = $1
          and ($3::timestamptz is null or (m.joined_at, m.user_id) > ($3::timestamptz, $4::uuid))
        order by m.joined_at, m.user_id limit $2
        """,
        team_id,
        limit,
        *(after or (None, None)),
    )
    return many(MemberRow, records)


async def count(tx: Connection, team_id: UUID) -> int:
    """How many members the team has."""
    number: int = await tx.fetchval("select count(*) from memberships where team_id = $1", team_id)
    return number


async def insert(tx: Connection, team_id: UUID, user_id: UUID, role: str) -> None:
    """The user joins now. ConstraintViolated("memberships_pkey") for a member."""
    await tx.execute(
        "insert into memberships (team_id, user_id, role, joined_at) values ($1, $2, $3, clock_timestamp())",
        team_id,
        user_id,
        role,
    )


async def set_role(tx: Connection, team_id: UUID, user_id: UUID, role: str) -> None:
    """ConstraintViolated("teams_have_owner") at the end of the transaction when the team has no owner then."""
    await tx.execute("update memberships set role = $3 where team_id = $1 and user_id = $2", team_id, user_id, role)


async def delete(tx: Connection, team_id: UUID, user_id: UUID) -> list[RevokedKey]:
    """The user is no member any more; returns the keys that ended with it, those made for the team by them.

    The membership goes first: who makes a key holds it, so a key that is being made is there when we look.
    """
    await tx.execute("delete from memberships where team_id = $1 and user_id = $2", team_id, user_id)
    records = await tx.fetch(
        """
        update api_keys set revoked_at = clock_timestamp()
        where team_id = $1 and created_by = $2 and revoked_at is null
        returning id, name
        """,
        team_id,
        user_id,
    )
    return many(RevokedKey, records)


async def administers(tx: Connection, user_id: UUID) -> bool:
    """Whether the user is admin or owner of any team that lives."""
    found: bool = await tx.fetchval(
        """
        select exists (
          select from memberships m join teams t on t.id = m.team_id
          where m.user_id = $1 and m.role in ('admin', 'owner') and t.deleted_at is null)
        """,
        user_id,
    )
    return found


async def search(tx: Connection, prefix: str, limit: int) -> list[FoundRow]:
    """People whose address begins so, by address; the prefix in small letters. What is a pattern to LIKE is text
    here."""
    escaped = prefix.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    records = await tx.fetch(
        f"select {_FOUND} from users where lower(email) like $1 || '%' order by lower(email) limit $2",
        escaped,
        limit,
    )
    return many(FoundRow, records)
