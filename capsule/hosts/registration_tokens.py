"""One-time tokens, by which a machine becomes a host: where they are kept, and how each is spent exactly once.

In PostgreSQL, or in Redis (capsule.hosts.redis_tokens) when an operator says so: both pass the same suite.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Protocol, TypeVar
from uuid import UUID

from capsule.config import Settings
from capsule.db.connection import Connection
from capsule.db.pool import Database
from capsule.db.queries import hosts as rows
from capsule.hosts.tokens import REGISTRATION_LIFETIME

T = TypeVar("T")


class RegistrationTokens(Protocol):
    """Keeps hashes (SHA-256) of tokens for REGISTRATION_LIFETIME. Each method raises capsule.errors.TokensUnavailable
    or capsule.db.errors.DatabaseUnavailable."""

    async def keep(self, host: UUID, sha256: bytes, *, created_by: UUID | None) -> None:
        """A host that lives gets a token; its older ones are void."""
        ...

    async def spend(self, sha256: bytes, use: Callable[[Connection, UUID], Awaitable[T]]) -> T | None:
        """Run `use(tx, host)` in a transaction that spends the token; None when the token is unknown, spent, void or
        expired, or its host is gone.

        Of two that try at once one gets it. Raises what `use` raises: then the token is good as before.
        """
        ...


def store_of(settings: Settings, db: Database) -> RegistrationTokens:
    """Where the operator wants them."""
    if not settings.redis_url:
        return TokensInDatabase(db)
    from capsule.hosts.redis_tokens import TokensInRedis  # noqa: PLC0415 - a tenth of a second that few need

    return TokensInRedis(settings.redis_url, db)


class TokensInDatabase:
    """A row each; spent in the transaction that uses it."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def keep(self, host: UUID, sha256: bytes, *, created_by: UUID | None) -> None:
        """See RegistrationTokens."""

        async def insert(tx: Connection) -> None:
            await rows.insert_registration_token(
                tx,
                host_id=host,
                sha256=sha256,
                expires_at=datetime.now(UTC) + REGISTRATION_LIFETIME,
                created_by=created_by,
            )

        await self._db.transaction(insert)

    async def spend(self, sha256: bytes, use: Callable[[Connection, UUID], Awaitable[T]]) -> T | None:
        """See RegistrationTokens."""

        async def take(tx: Connection) -> T | None:
            host = await rows.take_registration_token(tx, sha256)
            return None if host is None else await use(tx, host)

        return await self._db.transaction(take)
