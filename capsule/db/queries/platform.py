"""What platform admins see and change: all teams, users, hosts; and who is one."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.hosts import HostRow
from capsule.db.queries.rows import columns, many
from capsule.db.queries.teams import PLATFORM


class AnyTeamRow(msgspec.Struct, frozen=True, kw_only=True):
    """A team, deleted or not. `sandboxes`: those that are not over."""

    id: UUID
    name: str
    slug: str
    is_byoc: bool
    created_at: datetime
    deleted_at: datetime | None
    members: int
    sandboxes: int


class AnyUserRow(msgspec.Struct, frozen=True, kw_only=True):
    """An account; `permissions` of a platform admin."""

    id: UUID
    email: str
    name: str
    created_at: datetime
    permissions: list[str]


class AnyHostRow(HostRow, frozen=True, kw_only=True):
    """A host that lives; `team_name` of a team's own."""

    team_name: str | None


class AdminRow(msgspec.Struct, frozen=True, kw_only=True):
    """A platform admin."""

    email: str
    name: str
    permissions: list[str]


_PERMISSIONS = """
case when u.is_admin
  then array(select permission from admin_permissions p where p.user_id = u.id order by permission)
  else '{}' end as permissions
"""
_HOST_COLUMNS = columns(HostRow, "h").replace(
    "h.tags", "array(select tag from host_tags where host_id = h.id order by tag) as tags"
)
_OLDER = "($2::timestamptz is null or ({0}.created_at, {0}.id) < ($2::timestamptz, $3::uuid))"
_NEWEST = "order by {0}.created_at desc, {0}.id desc limit $1"

Before = tuple[datetime, UUID] | None


async def hold_permissions(tx: Connection, user_id: UUID) -> list[str]:
    """What a platform admin may, which nobody can take from them until the transaction ends; nothing for others."""
    records = await tx.fetch(
        """
        select p.permission from users u join admin_permissions p on p.user_id = u.id
        where u.id = $1 and u.is_admin for share
        """,
        user_id,
    )
    return [record["permission"] for record in records]


async def set_byoc(tx: Connection, team_id: UUID, *, enabled: bool) -> bool | None:
    """Whether that changed anything; None for a team that is not, was deleted, or is the platform's."""
    was: bool | None = await tx.fetchval(
        "select is_byoc from teams where id = $1 and id <> $2 and deleted_at is null for no key update",
        team_id,
        PLATFORM,
    )
    if was is None or was == enabled:
        return None if was is None else False
    await tx.execute("update teams set is_byoc = $2 where id = $1", team_id, enabled)
    return True


async def teams(tx: Connection, limit: int, before: Before) -> list[AnyTeamRow]:
    """All but the platform's, newest first."""
    records = await tx.fetch(
        f"""
        select t.id, t.name, t.slug, t.is_byoc, t.created_at, t.deleted_at,
          (select count(*) from memberships m where m.team_id = t.id) as members,
          (select count(*) from sandboxes s
            where s.team_id = t.id and s.status not in ('stopped', 'error')) as sandboxes
        from teams t where t.id <> $4 and {_OLDER.format("t")} {_NEWEST.format("t")}
        """,
        limit,
        *(before or (None, None)),
        PLATFORM,
    )
    return many(AnyTeamRow, records)


async def users(tx: Connection, limit: int, before: Before) -> list[AnyUserRow]:
    """All, newest first."""
    records = await tx.fetch(
        f"""
        select u.id, u.email, u.name, u.created_at, {_PERMISSIONS}
        from users u where {_OLDER.format("u")} {_NEWEST.format("u")}
        """,
        limit,
        *(before or (None, None)),
    )
    return many(AnyUserRow, records)


async def hosts(tx: Connection, limit: int, before: Before) -> list[AnyHostRow]:
    """All that live, newest first."""
    records = await tx.fetch(
        f"""
        select {_HOST_COLUMNS}, t.name as team_name
        from hosts h left join teams t on t.id = h.team_id
        where h.deleted_at is null and {_OLDER.format("h")} {_NEWEST.format("h")}
        """,
        limit,
        *(before or (None, None)),
    )
    return many(AnyHostRow, records)


async def admins(tx: Connection) -> list[AdminRow]:
    """All platform admins, by address."""
    records = await tx.fetch(
        f"select u.email, u.name, {_PERMISSIONS} from users u where u.is_admin order by lower(u.email)"
    )
    return many(AdminRow, records)


async def grant(tx: Connection, user_id: UUID, permissions: Sequence[str]) -> None:
    """They are a platform admin with these permissions, beside those they have."""
    await tx.execute("update users set is_admin = true where id = $1", user_id)
    await tx.execute(
        """
        insert into admin_permissions (user_id, permission) select $1, unnest($2::text[]) on conflict do nothing
        """,
        user_id,
        list(permissions),
    )


async def revoke(tx: Connection, user_id: UUID) -> list[str] | None:
    """They are no platform admin any more; returns what they were allowed, None when they were none."""
    # Who is none is not locked by the update: what somebody gives them beside it would be taken, and the role left.
    await tx.execute("select from users where id = $1 for no key update", user_id)
    was = await tx.fetchval("update users set is_admin = false where id = $1 and is_admin returning true", user_id)
    records = await tx.fetch("delete from admin_permissions where user_id = $1 returning permission", user_id)
    return sorted(record["permission"] for record in records) if was else None
