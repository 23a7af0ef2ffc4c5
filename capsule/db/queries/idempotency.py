"""Idempotency keys: the same request sent twice makes one resource. Good for 24 hours.

`owner_id` says whose key it is: the team's that a request acts for, or the user's that acts for none.
"""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection, Record
from capsule.db.queries.rows import columns, one, only


class IdempotencyRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a key was used for first. Another `endpoint` or `request_sha256` under the same key is a client's error."""

    owner_id: UUID
    key: str
    endpoint: str
    request_sha256: bytes
    resource_id: UUID
    created_at: datetime


_COLUMNS = columns(IdempotencyRow)


async def claim(
    tx: Connection, owner_id: UUID, key: str, request_hash: bytes, resource_id: UUID, *, endpoint: str = ""
) -> IdempotencyRow | None:
    """Use the key for `resource_id`: None when it is ours now, else what it was used for within 24 hours.

    Of two at once, the second waits for the first one's transaction: if that commits it gets its row, if it rolls back
    it gets the key.
    """
    claimed = await tx.fetchval(
        """
        insert into idempotency_keys as i (owner_id, key, endpoint, request_sha256, resource_id)
        values ($1, $2, $3, $4, $5)
        on conflict (owner_id, key) do update set
          endpoint = excluded.endpoint, request_sha256 = excluded.request_sha256,
          resource_id = excluded.resource_id, created_at = now()
        where i.created_at < now() - interval '24 hours'
        returning true
        """,
        owner_id,
        key,
        endpoint,
        request_hash,
        resource_id,
    )
    if claimed:
        return None
    return only(IdempotencyRow, await _fetch(tx, owner_id, key))


async def get(tx: Connection, owner_id: UUID, key: str) -> IdempotencyRow | None:
    """What the key was used for within 24 hours."""
    return one(IdempotencyRow, await _fetch(tx, owner_id, key, "and created_at >= now() - interval '24 hours'"))


async def release(tx: Connection, owner_id: UUID, key: str, resource_id: UUID) -> None:
    """Forget the key, if it stands for this resource, which will never be."""
    await tx.execute(
        "delete from idempotency_keys where owner_id = $1 and key = $2 and resource_id = $3", owner_id, key, resource_id
    )


async def _fetch(tx: Connection, owner_id: UUID, key: str, condition: str = "") -> Record | None:
    record: Record | None = await tx.fetchrow(
        f"select {_COLUMNS} from idempotency_keys where owner_id = $1 and key = $2 {condition}", owner_id, key
    )
    return record


async def prune(tx: Connection) -> None:
    """Forget keys that are good no more; a thousand at a time."""
    await tx.execute(
        """
        delete from idempotency_keys where (owner_id, key) in (
          select owner_id, key from idempotency_keys where created_at < now() - interval '24 hours'
          order by created_at limit 1000)
        """
    )
