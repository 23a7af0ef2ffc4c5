"""Accounts and their sessions: sign-up, login, logout, one's own profile."""

from __future__ import annotations

from uuid import UUID

from capsule.config import Settings
from capsule.db.pool import Database
from capsule.people.views import (
    AccountView,
    Authenticated,
)
from capsule.principals import User


class Accounts:
    """See `capsule.http.people_ports.AccountService`."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._settings = settings

    async def sign_up(
        self, *, email: str, password: str, name: str, address: str, idempotency_key: str | None
    ) -> Authenticated:
        """An account with its own team. EmailTaken, InvalidRequest, RateLimited."""
        raise NotImplementedError

    async def log_in(self, *, email: str, password: str, address: str) -> Authenticated:
        """Unauthorized, after the same time and in the same words whatever was wrong; RateLimited."""
        raise NotImplementedError

    async def log_out(self, user: User) -> None:
        """End the session."""
        raise NotImplementedError

    async def switch_team(self, user: User, team: UUID) -> Authenticated:
        """A session for another team of theirs. NotFound for one that is not or was deleted, Forbidden for one they are
        no member of."""
        raise NotImplementedError

    async def me(self, user: User) -> AccountView:
        """Their account."""
        raise NotImplementedError

    async def update_me(self, user: User, *, name: str | None) -> AccountView:
        """Change what is given."""
        raise NotImplementedError

    async def change_password(self, user: User, *, current: str | None, new: str, address: str) -> None:
        """`current` may be None only for an account without a password. Ends all other sessions. Forbidden when
        `current` is wrong, RateLimited."""
        raise NotImplementedError
