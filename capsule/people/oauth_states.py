"""The state of a sign-in through a provider: kept in the browser's cookie, signed, good once and for ten minutes.

The cookie is `state.expiry.mac`: 16 random bytes in base64url, seconds since 1970, and the HMAC-SHA256 of both and of
the provider's name in hex. PKCE's verifier is made from the state by another HMAC, so nothing has to be stored until
the state comes back (then `spent_oauth_states` remembers that it did).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from capsule.people.providers.provider import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable

    from capsule.config import Settings

LIFETIME = 600
"""Seconds."""
STATE_BYTES = 16

COOKIE_FORM = re.compile(r"([A-Za-z0-9_-]{22})\.([0-9]{1,12})\.([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnedState:
    """A state that came back to the browser it was made for. `sha256` is what is remembered of it."""

    attempt: Attempt
    sha256: bytes
    expires_at: datetime


class OAuthStates:
    """Makes states and knows its own again."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._mac_key = settings.derive_key("oauth-state")
        self._verifier_key = settings.derive_key("oauth-pkce")
        self._url = settings.url
        self._clock = clock

    def begin(self, provider: str) -> tuple[Attempt, str]:
        """A new attempt, and its cookie's value."""
        state = _base64url(secrets.token_bytes(STATE_BYTES))
        expiry = int(self._clock()) + LIFETIME
        return self._attempt(provider, state), f"{state}.{expiry}.{self._mac(provider, state, expiry)}"

    def returned(self, provider: str, state: str | None, cookie: str | None) -> ReturnedState | None:
        """The attempt that comes back; None when state and cookie are not a pair of ours, or too old."""
        match = COOKIE_FORM.fullmatch(cookie or "")
        if match is None or state is None:
            return None
        known, expiry = match[1], int(match[2])
        genuine = hmac.compare_digest(self._mac(provider, known, expiry), match[3])
        if not genuine or not hmac.compare_digest(known.encode(), state.encode(errors="replace")):
            return None
        if expiry <= self._clock():
            return None
        return ReturnedState(
            attempt=self._attempt(provider, known),
            sha256=hashlib.sha256(known.encode()).digest(),
            expires_at=datetime.fromtimestamp(expiry, UTC),
        )

    def _attempt(self, provider: str, state: str) -> Attempt:
        verifier = _base64url(hmac.digest(self._verifier_key, state.encode(), "sha256"))
        return Attempt(
            state=state,
            redirect_uri=f"{self._url}/v1/auth/oauth/{provider}/callback",
            verifier=verifier,
            challenge=_base64url(hashlib.sha256(verifier.encode()).digest()),
        )

    def _mac(self, provider: str, state: str, expiry: int) -> str:
        return hmac.digest(self._mac_key, f"{provider}.{state}.{expiry}".encode(), "sha256").hex()


def _base64url(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()
