"""Sign-in through providers: identities, states that came back, one-time login codes."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import only


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """Who an identity belongs to, and who has its address: both None for somebody new."""

    identity_of: UUID | None
    address_of: UUID | None


async def spend_state(tx: Connection, sha256: bytes, expires_at: datetime) -> bool:
    """Whether this is the first time that the state comes back; of two at once one is."""
    await tx.execute(
        """
        delete from spent_oauth_states where sha256 in (
          select sha256 from spent_oauth_states where expires_at < now() - interval '1 day'
          order by expires_at limit 100 for update skip locked)
        """
    )
    first = await tx.fetchval(
        "insert into spent_oauth_states (sha256, expires_at) values ($1, $2) on conflict do nothing returning true",
        sha256,
        expires_at,
    )
    return first is not None


async def claimed(tx: Connection, *, provider: str, subject: str, email: str | None) -> Claimed:
    """As of one moment: a registration beside us is seen whole or not at all. Nobody has the address None."""
    record = await tx.fetchrow(
        """
        select (select user_id from oauth_identities where provider = $1 and subject = $2) as identity_of,
               (select id from users where lower(email) = $3) as address_of
        """,
        provider,
        subject,
        email,
    )
    return only(Claimed, record)


async def insert_identity(tx: Connection, *, provider: str, subject: str, user_id: UUID) -> None:
    """Tie an identity to an account. ConstraintViolated("oauth_identities_pkey") when it is tied to one."""
    await tx.execute(
        "insert into oauth_identities (provider, subject, user_id) values ($1, $2, $3)", provider, subject, user_id
    )


async def insert_login_code(tx: Connection, sha256: bytes, user_id: UUID, seconds: int) -> None:
    """A code that is good once, for so many seconds. Those that are good no more are forgotten."""
    await tx.execute(
        """
        delete from login_codes where sha256 in (
          select sha256 from login_codes where expires_at < now() - interval '1 day'
          order by expires_at limit 100 for update skip locked)
        """
    )
    await tx.execute(
        """
        insert into login_codes (sha256, user_id, expires_at)
        values ($1, $2, clock_timestamp() + make_interval(secs => $3))
        """,
        sha256,
        user_id,
        seconds,
    )


async def take_login_code(tx: Connection, sha256: bytes) -> UUID | None:
    """Spend the code: whose it is, or None when it is unknown, spent, expired, or older than the last change of
    password, which ends it as it ends sessions. Of two at once one gets it. Whose it is stays unchanged until the
    transaction ends (as by `users.hold`): a change of password comes before this, or after the session."""
    user_id: UUID | None = await tx.fetchval(
        """
        with holder as (
          select u.id, u.sessions_valid_from from login_codes c join users u on u.id = c.user_id
          where c.sha256 = $1 for share of u)
        update login_codes c set used_at = clock_timestamp() from holder u
        where c.sha256 = $1 and c.used_at is null and c.expires_at > clock_timestamp()
          and u.id = c.user_id and c.created_at >= u.sessions_valid_from
        returning c.user_id
        """,
        sha256,
    )
    return user_id
