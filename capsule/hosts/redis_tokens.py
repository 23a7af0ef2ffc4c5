"""One-time tokens in Redis (5 or newer, no cluster), shared by all control planes; see registration_tokens.

    capsule:registration:token:<SHA-256, hex>  → host id         for as long as the token lives
    capsule:registration:host:<host id>        → SHA-256, hex    the host's newest token; older ones are void

Redis says which tokens there are, PostgreSQL which are spent: the transaction that uses one writes it down, and a
unique index lets that happen once. So whatever dies, or is not answered, in between, a token is neither lost nor used
twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar, cast
from uuid import UUID

import redis
import structlog
import trio
from redis.backoff import NoBackoff
from redis.retry import Retry

from capsule import errors
from capsule.db.connection import Connection
from capsule.db.pool import Database
from capsule.db.queries import hosts as rows
from capsule.hosts.tokens import REGISTRATION_LIFETIME

log = structlog.get_logger()

T = TypeVar("T")

ANSWER_TIMEOUT = 2.0
"""Seconds for connecting, and for each answer."""
TURN_TIMEOUT = 5.0
"""Seconds that a request waits for a thread while others wait for Redis."""
THREADS = 4
TOKEN_KEY = "capsule:registration:token:"  # noqa: S105 - how a key begins
HOST_KEY = "capsule:registration:host:"


class TokensInRedis:
    """See the module's docstring. Its client blocks: it is used from a few threads."""

    def __init__(self, url: str, db: Database) -> None:
        """Redis need not be up yet."""
        self._db = db
        self._limiter = trio.CapacityLimiter(THREADS)
        self._client = redis.Redis.from_url(
            url,
            protocol=2,
            decode_responses=True,
            socket_timeout=ANSWER_TIMEOUT,
            socket_connect_timeout=ANSWER_TIMEOUT,
            retry=Retry(NoBackoff(), 0),  # whoever asked us knows better when to ask again
        )

    async def keep(self, host: UUID, sha256: bytes, *, created_by: UUID | None) -> None:  # noqa: ARG002 - in the trail
        """See RegistrationTokens."""
        await self._ask(lambda: self._put(host, sha256.hex()))

    async def spend(self, sha256: bytes, use: Callable[[Connection, UUID], Awaitable[T]]) -> T | None:
        """See RegistrationTokens."""
        host = await self._ask(lambda: self._find(sha256.hex()))

        async def note_and_use(tx: Connection, host: UUID) -> T | None:
            spent = await rows.note_spent_token(tx, host, sha256, expires_at=datetime.now(UTC) + REGISTRATION_LIFETIME)
            return await use(tx, host) if spent else None

        return None if host is None else await self._db.transaction(note_and_use, host)

    def _put(self, host: UUID, digest: str) -> None:
        """Blocks."""
        transaction = self._client.pipeline(transaction=True)
        transaction.set(TOKEN_KEY + digest, str(host), ex=REGISTRATION_LIFETIME)
        transaction.set(HOST_KEY + str(host), digest, ex=REGISTRATION_LIFETIME)
        transaction.execute()

    def _find(self, digest: str) -> UUID | None:
        """The host of a token that is its newest. Blocks."""
        host = cast("str | None", self._client.get(TOKEN_KEY + digest))
        if host is None or self._client.get(HOST_KEY + host) != digest:
            return None
        return UUID(host)

    async def _ask(self, ask: Callable[[], T]) -> T:
        """Ask on a thread. What was begun is waited for, also when we are cancelled: it has time-outs."""
        try:
            with trio.move_on_after(TURN_TIMEOUT):
                return await trio.to_thread.run_sync(ask, limiter=self._limiter)
        except redis.RedisError as err:
            log.warning("redis_failed", reason=type(err).__name__)
            message = "the store of registration tokens does not answer; try again"
            raise errors.TokensUnavailable(message, retry_after=1) from err
        raise errors.TokensUnavailable("the store of registration tokens is busy; try again", retry_after=1)
