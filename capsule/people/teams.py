"""Teams and their members."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from capsule.config import Settings
from capsule.db.pool import Database
from capsule.model import Page, Position
from capsule.people.views import (
    FoundUser,
    MemberView,
    TeamView,
)
from capsule.principals import GivenRole, User


class Teams:
    """See `capsule.http.people_ports.TeamService`."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._settings = settings

    async def list(self, user: User, limit: int, before: Position | None) -> Page[TeamView]:
        """The user's teams that live, newest first."""
        raise NotImplementedError

    async def create(self, user: User, *, name: str, idempotency_key: str | None) -> TeamView:
        """A team that the user owns. QuotaExceeded."""
        raise NotImplementedError

    async def get(self, user: User, team: UUID) -> tuple[TeamView, Sequence[MemberView]]:
        """The team and its members, in the order they joined."""
        raise NotImplementedError

    async def rename(self, user: User, team: UUID, name: str) -> None:
        """Another name; the slug stays."""
        raise NotImplementedError

    async def delete(self, user: User, team: UUID) -> None:
        """The team is gone at once; its sandboxes and templates are being destroyed."""
        raise NotImplementedError

    async def members(self, user: User, team: UUID, limit: int, after: Position | None) -> Page[MemberView]:
        """In the order they joined; `after` is (joined_at, user_id) of the last page's last."""
        raise NotImplementedError

    async def add_member(self, user: User, team: UUID, *, email: str, idempotency_key: str | None) -> MemberView:
        """NotFound for an unknown address, Conflict for a member, QuotaExceeded."""
        raise NotImplementedError

    async def change_role(self, user: User, team: UUID, member: UUID, role: GivenRole) -> None:
        """Forbidden for the owner's; NotFound for somebody who is no member."""
        raise NotImplementedError

    async def remove_member(self, user: User, team: UUID, member: UUID) -> None:
        """They lose everything at once, the keys they made too. Forbidden for the owner; NotFound."""
        raise NotImplementedError

    async def leave(self, user: User, team: UUID) -> None:
        """As being removed. Forbidden for the owner."""
        raise NotImplementedError

    async def search(self, user: User, email_prefix: str) -> Sequence[FoundUser]:
        """At most 10 people by the beginning of their address. Forbidden for who is admin or owner of no team;
        RateLimited."""
        raise NotImplementedError
