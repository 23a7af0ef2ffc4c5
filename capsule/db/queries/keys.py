"""API keys. Only the SHA-256 of a key is known here."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, many, one, only


class ApiKeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """A key that is not revoked. `team_alive` False: its team was deleted."""

    id: UUID
    team_id: UUID
    name: str
    prefix: str
    sha256: bytes
    created_by: UUID | None
    created_at: datetime
    last_used_at: datetime | None
    team_alive: bool


class ListedKeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """A key that is not revoked, and who made it: None for the platform's, and when their account is gone."""

    id: UUID
    name: str
    prefix: str
    created_at: datetime
    last_used_at: datetime | None
    created_by: UUID | None
    creator_email: str | None
    creator_name: str | None


_COLUMNS = columns(ApiKeyRow, "k").replace("k.team_alive", "t.deleted_at is null as team_alive")
_LISTED = (
    columns(ListedKeyRow, "k")
    .replace("k.creator_email", "u.email as creator_email")
    .replace("k.creator_name", "u.name as creator_name")
)


async def insert(
    tx: Connection, *, team_id: UUID, name: str, prefix: str, sha256: bytes, created_by: UUID | None
) -> ApiKeyRow:
    """A new key; `prefix` is its first 12 characters, `sha256` the hash of all of it."""
    record = await tx.fetchrow(
        f"""
        with k as (
          insert into api_keys (team_id, name, prefix, sha256, created_by) values ($1, $2, $3, $4, $5) returning *)
        select {_COLUMNS} from k join teams t on t.id = k.team_id
        """,
        team_id,
        name,
        prefix,
        sha256,
        created_by,
    )
    return only(ApiKeyRow, record)


async def by_hash(tx: Connection, sha256: bytes) -> ApiKeyRow | None:
    """The key with this hash, unless it is unknown or revoked."""
    record = await tx.fetchrow(
        f"""
        select {_COLUMNS} from api_keys k join teams t on t.id = k.team_id
        where k.sha256 = $1 and k.revoked_at is null
        """,
        sha256,
    )
    return one(ApiKeyRow, record)


async def lock(tx: Connection, team_id: UUID, key_id: UUID) -> ApiKeyRow | None:
    """A key of this team, for the one transaction that may end it; None when it has none such, or it was revoked."""
    record = await tx.fetchrow(
        f"""
        select {_COLUMNS} from api_keys k join teams t on t.id = k.team_id
        where k.id = $1 and k.team_id = $2 and k.revoked_at is null for update of k
        """,
        key_id,
        team_id,
    )
    return one(ApiKeyRow, record)


async def touch_last_used(tx: Connection, key_id: UUID) -> None:
    """The key was used now; written at most once a minute."""
    await tx.execute(
        """
        update api_keys set last_used_at = now()
        where id = $1 and (last_used_at is null or last_used_at < now() - interval '1 minute')
        """,
        key_id,
    )


async def revoke(tx: Connection, team_id: UUID, key_id: UUID) -> bool:
    """End a key of this team; False when it has none such, or it was revoked before."""
    tag = await tx.execute(
        "update api_keys set revoked_at = now() where id = $1 and team_id = $2 and revoked_at is null", key_id, team_id
    )
    return tag == "UPDATE 1"


async def listed(tx: Connection, key_id: UUID) -> ListedKeyRow | None:
    """As lists show it, unless it is unknown or revoked."""
    record = await tx.fetchrow(
        f"""
        select {_LISTED} from api_keys k left join users u on u.id = k.created_by
        where k.id = $1 and k.revoked_at is null
        """,
        key_id,
    )
    return one(ListedKeyRow, record)


async def page(
    tx: Connection,
    team_id: UUID,
    *,
    limit: int,
    created_by: UUID | None = None,
    before: tuple[datetime, UUID] | None = None,
) -> list[ListedKeyRow]:
    """The team's keys that are not revoked, newest first: `created_by` one person, strictly older than `before`."""
    created_at, id_ = before or (None, None)
    records = await tx.fetch(
        f"""
        select {_LISTED} from api_keys k left join users u on u.id = k.created_by
        where k.team_id = $1 and k.revoked_at is null and ($2::uuid is null or k.created_by = $2)
          and ($3::timestamptz is null or (k.created_at, k.id) < ($3, $4::uuid))
        order by k.created_at desc, k.id desc limit $5
        """,
        team_id,
        created_by,
        created_at,
        id_,
        limit,
    )
    return many(ListedKeyRow, records)


async def lock_team(tx: Connection, team_id: UUID) -> int | None:
    """`max_api_keys` of a team that lives, with a lock that makes its keys one after the other, and after or before
    its deletion. Taken before any other lock."""
    limit: int | None = await tx.fetchval(
        "select max_api_keys from teams where id = $1 and deleted_at is null for no key update", team_id
    )
    return limit


async def lock_maker(tx: Connection, team_id: UUID, user_id: UUID) -> str | None:
    """The role of a member, who stays one until the transaction ends: removing them waits. None for nobody."""
    role: str | None = await tx.fetchval(
        "select role from memberships where team_id = $1 and user_id = $2 for share", team_id, user_id
    )
    return role


async def count(tx: Connection, team_id: UUID) -> int:
    """The team's keys that are not revoked."""
    found: int = await tx.fetchval("select count(*) from api_keys where team_id = $1 and revoked_at is null", team_id)
    return found
