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


_COLUMNS = columns(ApiKeyRow, "k").replace("k.team_alive", "t.deleted_at is null as team_alive")


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


async def list_for_team(tx: Connection, team_id: UUID) -> list[ApiKeyRow]:
    """The team's keys that are not revoked, newest first."""
    records = await tx.fetch(
        f"""
        select {_COLUMNS} from api_keys k join teams t on t.id = k.team_id
        where k.team_id = $1 and k.revoked_at is null order by k.created_at desc, k.id desc
        """,
        team_id,
    )
    return many(ApiKeyRow, records)
