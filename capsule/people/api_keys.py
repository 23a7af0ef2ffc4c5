"""API keys of a team."""

from __future__ import annotations

from uuid import UUID

from capsule.config import Settings
from capsule.db.pool import Database
from capsule.model import Page, Position
from capsule.people.views import (
    ApiKeyView,
    NewApiKey,
)
from capsule.principals import Principal


class ApiKeys:
    """See `capsule.http.people_ports.ApiKeyService`."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._settings = settings

    async def create(self, principal: Principal, *, name: str, idempotency_key: str | None) -> NewApiKey:
        """A key, shown once. QuotaExceeded."""
        raise NotImplementedError

    async def list(self, principal: Principal, limit: int, before: Position | None) -> Page[ApiKeyView]:
        """Newest first."""
        raise NotImplementedError

    async def revoke(self, principal: Principal, key: UUID) -> None:
        """It is dead at once. NotFound for a key that is not the team's, Forbidden for another member's."""
        raise NotImplementedError
