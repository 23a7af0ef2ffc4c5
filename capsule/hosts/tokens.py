"""The three secrets of a host: registration token (once, one hour), refresh token (60 days, rotating), JWT (seven days
unless it is set).

The first two are random and kept as SHA-256; they have 256 bits, so a plain hash is enough. The JWT is signed with a
key of its own: no user session is ever a host token, nor the other way round.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import jwt
import msgspec

from capsule.errors import Unauthorized

if TYPE_CHECKING:
    from capsule.config import Settings

REGISTRATION_LIFETIME = timedelta(hours=1)
REFRESH_LIFETIME = timedelta(days=60)

REGISTRATION_PREFIX = "htok-"
REFRESH_PREFIX = "hrt-"

KEY_PURPOSE = "host-token"
REFRESH_KEY_PURPOSE = "host-refresh-token"
ALGORITHM = "HS256"
TYPE = "host"
MAX_TOKEN_CHARACTERS = 2048
"""Ours have about 300; more is not worth decoding."""

_SECRET = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HostClaims:
    """What a sound host JWT says. `epoch` counts the host's registrations: a new one ends the tokens of the old."""

    host_id: UUID
    epoch: int


def new_registration_token() -> str:
    """`htok-` and 64 hex digits."""
    return REGISTRATION_PREFIX + secrets.token_hex(32)


def new_refresh_token() -> str:
    """`hrt-` and 64 hex digits."""
    return REFRESH_PREFIX + secrets.token_hex(32)


def is_well_formed(token: str, prefix: str) -> bool:
    """Whether `token` could be one of ours at all."""
    return token.startswith(prefix) and _SECRET.fullmatch(token, len(prefix)) is not None


def digest(token: str) -> bytes:
    """What is stored of a random token: SHA-256, 32 bytes."""
    return hashlib.sha256(token.encode()).digest()


class RefreshTokens:
    """Makes the tokens that follow each other.

    The token that follows is a function of the one spent and of the key that asks. So an agent whose answer was lost
    may ask again with the same key and gets the same answer; whoever only has the spent token gets another one, which
    is how theft shows.
    """

    def __init__(self, settings: Settings) -> None:
        self._key = settings.derive_key(REFRESH_KEY_PURPOSE)

    def following(self, spent: str, public_key: bytes | None) -> str:
        """The successor of `spent` for the holder of `public_key`; without one it is random."""
        if public_key is None:
            return new_refresh_token()
        return REFRESH_PREFIX + hmac.digest(self._key, digest(spent) + public_key, "sha256").hex()


class HostTokens:
    """Signs and checks host JWTs. Whether the host lives and the epoch is current is the database's to say."""

    def __init__(self, settings: Settings) -> None:
        self._key = settings.derive_key(KEY_PURPOSE)
        self._lifetime = timedelta(seconds=settings.host_token_lifetime)

    def issue(self, host_id: UUID, epoch: int, *, now: datetime | None = None) -> str:
        """A JWT for `host_id`."""
        now = now or datetime.now(UTC)
        claims: dict[str, Any] = {
            "sub": str(host_id),
            "typ": TYPE,
            "epoch": epoch,
            "iat": now,
            "exp": now + self._lifetime,
            "jti": str(uuid4()),
        }
        return jwt.encode(claims, self._key, ALGORITHM)

    def check(self, token: str) -> HostClaims:
        """The claims of a token that we signed and that has not expired; Unauthorized otherwise."""
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise Unauthorized("the host token is not valid")
        try:
            claims = jwt.decode(
                token,
                self._key,
                [ALGORITHM],
                options={"require": ["sub", "typ", "epoch", "iat", "exp"]},
            )
            if claims["typ"] != TYPE:
                raise Unauthorized("the token is not a host's")
            return HostClaims(UUID(claims["sub"]), msgspec.convert(claims["epoch"], int))
        except jwt.ExpiredSignatureError as err:
            raise Unauthorized("the host token has expired: refresh it") from err
        except (jwt.InvalidTokenError, msgspec.ValidationError, ValueError) as err:
            raise Unauthorized("the host token is not valid") from err
