"""What platform admins do."""

from __future__ import annotations

from uuid import UUID

from capsule.config import Settings
from capsule.db.pool import Database
from capsule.model import Page, Position
from capsule.people.views import (
    AnyHostView,
    AnyTeamView,
    AnyUserView,
)
from capsule.principals import User


class Platform:
    """See `capsule.http.people_ports.PlatformService`."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._settings = settings

    async def set_byoc(self, user: User, team: UUID, *, enabled: bool) -> None:
        """Whether the team brings its own hosts. NotFound for a team that is not or was deleted."""
        raise NotImplementedError

    async def teams(self, limit: int, before: Position | None) -> Page[AnyTeamView]:
        """All but the platform's own, newest first."""
        raise NotImplementedError

    async def users(self, limit: int, before: Position | None) -> Page[AnyUserView]:
        """All, newest first."""
        raise NotImplementedError

    async def hosts(self, limit: int, before: Position | None) -> Page[AnyHostView]:
        """All that were not deleted, newest first."""
        raise NotImplementedError
