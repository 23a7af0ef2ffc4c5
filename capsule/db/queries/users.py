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
    tx: Connection,
    *,
    email: str,
    name: str,
    password_hash: str | None = None,
    is_admin: bool = False,
    user_id: UUID | None = None,
) -> UserRow:
    """A new account. `email` is in its one form (`capsule.people.registration.email_address`), here and wherever it is
    looked for. ConstraintViolated("users_email_key") when the address is taken."""
    record = await tx.fetchrow(
        f"""
        insert into users (id, email, name, password_hash, is_admin)
        values (coalesce($5, gen_random_uuid()), $1, $2, $3, $4) returning {_COLUMNS}
        """,
        email,
        name,
        password_hash,
        is_admin,
        user_id,
    )
    return only(UserRow, record)


async def get(tx: Connection, user_id: UUID) -> UserRow | None:
    """By id."""
    return one(UserRow, await tx.fetchrow(f"select {_COLUMNS} from users where id = $1", user_id))


async def by_email(tx: Connection, email: str) -> UserRow | None:
    """By address in its one form. What `lower` makes of text depends on the database; it is asked of what is stored
    only, for the index, and leaves that as it is."""
    return one(UserRow, await tx.fetchrow(f"select {_COLUMNS} from users where lower(email) = $1", email))


async def hold(tx: Connection, user_id: UUID) -> UserRow | None:
    """By id, unchanged until the transaction ends: what happens to the password meanwhile happens after it."""
    return one(UserRow, await tx.fetchrow(f"select {_COLUMNS} from users where id = $1 for share", user_id))


async def lock(tx: Connection, user_id: UUID) -> UserRow | None:
    """By id, for a change: sessions that begin wait until the transaction ends."""
    return one(UserRow, await tx.fetchrow(f"select {_COLUMNS} from users where id = $1 for no key update", user_id))


async def password_costs(tx: Connection) -> list[str]:
    """What verifying a password costs, of all that are stored: the parameters that their hashes begin with, and nothing
    else of them."""
    records = await tx.fetch(
        r"""
        select distinct substring(password_hash from '^\$argon2id\$v=19\$m=\d{1,8},t=\d{1,4},p=\d{1,4}\$') as cost
        from users where password_hash like '$argon2id$v=19$m=%' order by cost
        """
    )
    return [record["cost"] for record in records if record["cost"] is not None]


async def rename(tx: Connection, user_id: UUID, name: str) -> None:
    """Another name."""
    await tx.execute("update users set name = $2 where id = $1", user_id, name)


async def rehash(tx: Connection, user_id: UUID, *, old_hash: str, new_hash: str) -> None:
    """The same password, hashed otherwise; nothing when it is not the same any more."""
    await tx.execute(
        "update users set password_hash = $3 where id = $1 and password_hash = $2", user_id, old_hash, new_hash
    )


async def set_password(tx: Connection, user_id: UUID, password_hash: str, *, kept_session: UUID) -> None:
    """Another password, which ends all sessions but one. The row must be locked: the moment from which sessions are
    good is read here, and must be after the last one that began."""
    await tx.execute(
        """
        update users set password_hash = $2, kept_session = $3,
          sessions_valid_from = greatest(clock_timestamp(), sessions_valid_from + interval '1 microsecond')
        where id = $1
        """,
        user_id,
        password_hash,
        kept_session,
    )
