"""Reading the audit trail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capsule.auth.access import reaches_all
from capsule.db.queries import audit
from capsule.db.translated import TranslatedDatabase
from capsule.model import Page, Position
from capsule.people.views import AuditEntry, AuditFilter, Scope

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.db.queries.audit import AuditRow
    from capsule.principals import Principal


class AuditTrail:
    """See `capsule.http.people_ports.AuditService`."""

    def __init__(self, db: Database, _settings: Settings) -> None:
        self._db = TranslatedDatabase(db)

    async def list(
        self, principal: Principal, wanted: AuditFilter, limit: int, before: Position | None
    ) -> Page[AuditEntry]:
        """Newest first; members see scope `team` only."""
        rows = await self._db.run(_page, principal, wanted, limit + 1, before)
        entries = tuple(_entry(row) for row in rows[:limit])
        return Page(entries, Position(entries[-1].created_at, entries[-1].id) if len(rows) > limit else None)


async def _page(
    connection: Connection, principal: Principal, wanted: AuditFilter, limit: int, before: Position | None
) -> list[AuditRow]:
    scopes: list[Scope] = ["team", "admin"] if reaches_all("listAuditLogs", principal.role) else ["team"]
    return await audit.page(
        connection,
        principal.team_id,
        scopes=scopes,
        resource_types=sorted(wanted.resource_types),
        actions=sorted(wanted.actions),
        limit=limit,
        before=None if before is None else (before.created_at, before.id),
    )


def _entry(row: AuditRow) -> AuditEntry:
    return AuditEntry(
        id=row.id,
        created_at=row.created_at,
        actor_type=row.actor_type,
        actor_id=row.actor_id,
        actor_name=row.actor_name,
        resource_type=row.resource_type,
        resource_id=row.resource_id,
        action=row.action,
        scope=row.scope,
        status=row.status,
        metadata=row.metadata,
    )
