"""Sessions of people: who holds one, which are dead. The token itself is known to its holder only."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import one, only


class HolderRow(msgspec.Struct, frozen=True, kw_only=True):
    """A person as a session finds them. `team_id` and `role`: of the session's team, if it lives and they are in it.
    `permissions`: what a platform admin may."""

    id: UUID
    email: str
    name: str
    team_id: UUID | None
    role: str | None
    permissions: list[str]


class LandingRow(msgspec.Struct, frozen=True, kw_only=True):
    """Where a login lands (`team_id` and `role` None: no team of theirs lives), and when it is."""

    team_id: UUID | None
    role: str | None
    now: datetime


class PlaceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A team as somebody who wants to act for it finds it. `role` None: they are no member of it."""

    role: str | None
    now: datetime


async def landing(tx: Connection, user_id: UUID) -> LandingRow:
    """The default team if it lives, else the first they joined that does; none for nobody, after the same work.

    `now` is never before the moment from which their sessions are good, even when the server's clock was set back.
    """
    record = await tx.fetchrow(
        """
        select place.team_id, place.role, greatest(clock_timestamp(), u.sessions_valid_from) as now
        from (values ($1::uuid)) as asked (id) left join users u on u.id = asked.id left join lateral (
          select m.team_id, m.role from memberships m join teams t on t.id = m.team_id and t.deleted_at is null
          where m.user_id = asked.id order by m.is_default desc, m.joined_at, m.team_id limit 1) place on true
        """,
        user_id,
    )
    return only(LandingRow, record)


async def place(tx: Connection, user_id: UUID, team_id: UUID) -> PlaceRow | None:
    """Somebody's role in a team, and when it is, as in `landing`; None for a team that is not or was deleted."""
    record = await tx.fetchrow(
        """
        select m.role, greatest(clock_timestamp(), u.sessions_valid_from) as now
        from teams t join users u on u.id = $1 left join memberships m on m.team_id = t.id and m.user_id = u.id
        where t.id = $2 and t.deleted_at is null
        """,
        user_id,
        team_id,
    )
    return one(PlaceRow, record)


async def holder(
    tx: Connection, *, user_id: UUID, jti: UUID, issued_at: datetime, team_id: UUID | None
) -> HolderRow | None:
    """Who holds this session; None when the account is gone, or the session was ended."""
    record = await tx.fetchrow(
        """
        select u.id, u.email, u.name, t.id as team_id, m.role,
          case when u.is_admin
            then array(select permission from admin_permissions p where p.user_id = u.id) else '{}' end as permissions
        from users u
          left join memberships m on m.user_id = u.id and m.team_id = $4
            and exists (select from teams where id = m.team_id and deleted_at is null)
          left join teams t on t.id = m.team_id
        where u.id = $1
          and (u.sessions_valid_from <= $3 or u.kept_session = $2)
          and not exists (select from revoked_sessions r where r.jti = $2)
        """,
        user_id,
        jti,
        issued_at,
        team_id,
    )
    return one(HolderRow, record)


async def revoke(tx: Connection, *, jti: UUID, user_id: UUID, expires_at: datetime) -> None:
    """End a session; again is nothing, and so is one of an account that is gone."""
    await tx.execute(
        """
        insert into revoked_sessions (jti, user_id, expires_at)
        select $1, id, $3 from users where id = $2 for key share
        on conflict do nothing
        """,
        jti,
        user_id,
        expires_at,
    )


async def now(tx: Connection) -> datetime:
    """The clock by which sessions are issued."""
    moment: datetime = await tx.fetchval("select clock_timestamp()")
    return moment


async def prune(tx: Connection) -> None:
    """Forget ended sessions whose tokens have expired anyway; a thousand at a time."""
    await tx.execute(
        """
        delete from revoked_sessions where jti in (
          select jti from revoked_sessions where expires_at < now() order by expires_at limit 1000)
        """
    )
