"""Accounts of people."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, one, only


class UserRow(msgspec.Struct, frozen=True, kw_only=True):
    """An account. `password_hash` None: signs in through a provider only."""

    id: UUID
    email: str
    name: str
    password_hash: str | None
    is_admin: bool
    sessions_valid_from: datetime | None
    created_at: datetime


# The driver gives -infinity as the smallest datetime, which no arithmetic survives; None says it better.
_COLUMNS = columns(UserRow).replace(
    "sessions_valid_from", "nullif(sessions_valid_from, '-infinity') as sessions_valid_from"
)


async def insert(
    tx: Connection, *, email: str, name: str, password_hash: str | None = None, is_admin: bool = False
) -> UserRow:
    """A new account. ConstraintViolated("users_email_key") when the address is taken, in whatever case."""
    record = await tx.fetchrow(
        f"insert into users (email, name, password_hash, is_admin) values ($1, $2, $3, $4) returning {_COLUMNS}",
        email,
        name,
        password_hash,
        is_admin,
    )
    return only(UserRow, record)


async def get(tx: Connection, user_id: UUID) -> UserRow | None:
    """By id."""
    return one(UserRow, await tx.fetchrow(f"select {_COLUMNS} from users where id = $1", user_id))


async def by_email(tx: Connection, email: str) -> UserRow | None:
    """By address, in whatever case."""
    return one(UserRow, await tx.fetchrow(f"select {_COLUMNS} from users where lower(email) = lower($1)", email))
