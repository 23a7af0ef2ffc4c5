"""Refresh tokens of hosts: each is spent once for the next of its family. Only their SHA-256 is known here."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, one, only


class RefreshTokenRow(msgspec.Struct, frozen=True, kw_only=True):
    """Good while neither superseded nor revoked, before `expires_at`, on a host that lives."""

    id: UUID
    host_id: UUID
    family: UUID
    created_at: datetime
    expires_at: datetime
    superseded_at: datetime | None
    revoked_at: datetime | None


_COLUMNS = columns(RefreshTokenRow)


async def insert(
    tx: Connection, *, host_id: UUID, family: UUID, sha256: bytes, expires_at: datetime
) -> RefreshTokenRow:
    """The first token of a family (a registration)."""
    record = await tx.fetchrow(
        f"""
        insert into host_refresh_tokens (host_id, family, sha256, expires_at) values ($1, $2, $3, $4)
        returning {_COLUMNS}
        """,
        host_id,
        family,
        sha256,
        expires_at,
    )
    return only(RefreshTokenRow, record)


async def get(tx: Connection, sha256: bytes) -> RefreshTokenRow | None:
    """By hash, good or not: tells a spent token, shown again, from an unknown one."""
    return one(
        RefreshTokenRow, await tx.fetchrow(f"select {_COLUMNS} from host_refresh_tokens where sha256 = $1", sha256)
    )


async def lock_host(tx: Connection, sha256: bytes) -> None:
    """Hold the host whose token this is until the transaction ends: whatever makes or ends its tokens comes one after
    the other, and so finds all that there are. Nothing for an unknown token."""
    await tx.execute(
        "select from hosts where id = (select host_id from host_refresh_tokens where sha256 = $1) for no key update",
        sha256,
    )


async def rotate(tx: Connection, *, sha256: bytes, new_sha256: bytes, expires_at: datetime) -> RefreshTokenRow | None:
    """Spend a token for the next of its family; the new row, or None when the old one is not good.

    Of two that try at once one gets it.
    """
    spent = await tx.fetchrow(
        """
        update host_refresh_tokens r set superseded_at = now() from hosts h
        where r.sha256 = $1 and r.superseded_at is null and r.revoked_at is null and r.expires_at > now()
          and h.id = r.host_id and h.deleted_at is null
        returning r.host_id, r.family
        """,
        sha256,
    )
    if spent is None:
        return None
    return await insert(tx, host_id=spent["host_id"], family=spent["family"], sha256=new_sha256, expires_at=expires_at)


async def revoke_family(tx: Connection, family: UUID) -> bool:
    """End every token that descends from one registration: somebody showed a spent one. False when they had ended: of
    two that try at once one does it, and a registration that came between has done it. The caller holds the host."""
    tag = await tx.execute(
        "update host_refresh_tokens set revoked_at = now() where family = $1 and revoked_at is null", family
    )
    return tag != "UPDATE 0"
