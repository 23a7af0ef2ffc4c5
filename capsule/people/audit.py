"""Reading the audit trail."""

from __future__ import annotations

from capsule.config import Settings
from capsule.db.pool import Database
from capsule.model import Page, Position
from capsule.people.views import (
    AuditEntry,
    AuditFilter,
)
from capsule.principals import Principal


class AuditTrail:
    """See `capsule.http.people_ports.AuditService`."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._settings = settings

    async def list(
        self, principal: Principal, wanted: AuditFilter, limit: int, before: Position | None
    ) -> Page[AuditEntry]:
        """Newest first; members see scope `team` only."""
        raise NotImplementedError
