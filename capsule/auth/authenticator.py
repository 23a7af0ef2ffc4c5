"""Both kinds of credentials of the API behind one door (`capsule.http.ports.Authenticator`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from capsule.auth.keys import ApiKeyAuthenticator
    from capsule.auth.sessions import SessionAuthenticator
    from capsule.principals import Principal, User


@dataclass(frozen=True, slots=True)
class Authenticator:
    """Asks the one whose kind it is."""

    keys: ApiKeyAuthenticator
    sessions: SessionAuthenticator

    async def api_key(self, key: str) -> Principal:
        """See `ApiKeyAuthenticator.api_key`."""
        return await self.keys.api_key(key)

    async def session(self, token: str) -> User:
        """See `SessionAuthenticator.session`."""
        return await self.sessions.session(token)
