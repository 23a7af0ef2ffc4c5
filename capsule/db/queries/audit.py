"""The audit trail: rows are added, in the transaction of what they tell of, and never changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal
from uuid import UUID

from capsule.db.connection import Connection

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
