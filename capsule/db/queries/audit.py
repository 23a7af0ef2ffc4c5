"""The audit trail: rows are added, in the transaction of what they tell of, and never changed."""

# ruff: noqa: S608 - only column lists and conditions of this module are put into statements

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal, get_args
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, many

ActorType = Literal["user", "api_key", "system"]
Scope = Literal["team", "admin"]
Outcome = Literal["success", "info", "warning", "error"]


async def append(
    tx: Connection,
    *,
    actor_type: ActorType,
    actor_id: UUID | None,
    actor_name: str,
    team_id: UUID | None,
    resource_type: str,
    resource_id: str | UUID,
    action: str,
    scope: Scope = "team",
    status: Outcome = "success",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Add a row. `actor_id` is None exactly for the system (and for a failed login by nobody known)."""
    await tx.execute(
        """
        insert into audit_logs (actor_type, actor_id, actor_name, team_id, resource_type, resource_id, action, scope,
                                status, metadata)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
        """,
        actor_type,
        actor_id,
        actor_name,
        team_id,
        resource_type,
        str(resource_id),
        action,
        scope,
        status,
        dict(metadata or {}),
    )


async def append_system(
    tx: Connection, team_id: UUID, sandbox_id: UUID, *, action: str, status: Outcome, metadata: Mapping[str, str]
) -> None:
    """What the system did to a sandbox, or learned that its host did."""
    await append(
        tx,
        actor_type="system",
        actor_id=None,
        actor_name="monitor",
        team_id=team_id,
        resource_type="sandbox",
        resource_id=f"sb-{sandbox_id}",
        action=action,
        status=status,
        metadata=metadata,
    )


class AuditRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the trail."""

    id: UUID
    created_at: datetime
    actor_type: ActorType
    actor_id: UUID | None
    actor_name: str
    resource_type: str
    resource_id: str
    action: str
    scope: Scope
    status: Outcome
    metadata: dict[str, str]


_OLDER = """
  a.team_id = $1
  and (a.created_at, a.id) < (coalesce($2::timestamptz, 'infinity'),
                              coalesce($3::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff'))
"""
"""A bound that is always there: "no cursor, or older than it" would be no range of an index."""

_ORDER = "order by created_at desc, id desc limit $4"

_ALL = f"select {columns(AuditRow, 'a')} from audit_logs a where {_OLDER} {_ORDER}"

_SOME = f"""
with recursive kinds as (
  (select scope, resource_type, action from audit_logs where team_id = $1
   order by scope, resource_type, action limit 1)
  union all
  select next.* from kinds k cross join lateral (
    select scope, resource_type, action from audit_logs
    where team_id = $1 and (scope, resource_type, action) > (k.scope, k.resource_type, k.action)
    order by scope, resource_type, action limit 1) next
)
select rows.* from kinds k cross join lateral (
  select {columns(AuditRow, "a")} from audit_logs a
  where a.scope = k.scope and a.resource_type = k.resource_type and a.action = k.action and {_OLDER} {_ORDER}) rows
where k.scope = any($5)
  and (cardinality($6::text[]) = 0 or k.resource_type = any($6))
  and (cardinality($7::text[]) = 0 or k.action = any($7))
{_ORDER}
"""
"""The kinds of rows that the team has, each found by one look into audit_logs_kind beyond the last (PostgreSQL's wiki:
loose index scan); a page of each kind that is wanted; the newest of those. The work is bounded by kinds times page,
whatever is asked for, however many rows there are and however rare those are that match."""


async def page(
    tx: Connection,
    team_id: UUID,
    *,
    scopes: Sequence[Scope],
    resource_types: Sequence[str],
    actions: Sequence[str],
    limit: int,
    before: tuple[datetime, UUID] | None,
) -> list[AuditRow]:
    """The team's rows, newest first (of equal times the greater id first), strictly older than `before`: of one of
    `scopes`, and of one of `resource_types` and `actions`; these empty: of all."""
    created_at, id_ = before or (None, None)
    bounds = (team_id, created_at, id_, limit)
    if resource_types or actions or set(scopes) != set(get_args(Scope)):
        records = await tx.fetch(_SOME, *bounds, list(scopes), list(resource_types), list(actions))
    else:
        records = await tx.fetch(_ALL, *bounds)
    return many(AuditRow, records)
