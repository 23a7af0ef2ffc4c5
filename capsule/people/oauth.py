"""Signing in through an identity provider."""

from __future__ import annotations

from capsule.config import Settings
from capsule.db.pool import Database
from capsule.people.views import (
    Authenticated,
    Redirect,
)


class OAuth:
    """See `capsule.http.people_ports.OAuthService`."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._settings = settings

    async def start(self, provider: str, *, address: str) -> Redirect:
        """To the provider. ProviderNotFound, RateLimited."""
        raise NotImplementedError

    async def finish(
        self,
        provider: str,
        *,
        code: str | None,
        state: str | None,
        error: str | None,
        cookies: dict[str, str],
        address: str,
    ) -> Redirect:
        """Back to the dashboard, always: with a one-time code, or with an error. Never raises a CapsuleError."""
        raise NotImplementedError

    async def exchange(self, *, code: str, cookies: dict[str, str], address: str) -> Authenticated:
        """Spend the one-time code, in the browser that got it. Unauthorized, RateLimited."""
        raise NotImplementedError
