"""Leadership among the processes on one database: a session-level advisory lock on a connection of its own.

The lock lives exactly as long as the server keeps that session, so a leader that dies is replaced at once. A leader
that is cut off finds out within PROBE_INTERVAL + PROBE_TIMEOUT; what it writes until then meets compare-and-set.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import suppress
from types import TracebackType
from typing import Self

import asyncpg
import structlog
import trio

from capsule.db.bridge import Bridge
from capsule.db.errors import DatabaseUnavailable

log = structlog.get_logger()

PROBE_INTERVAL = 5.0
"""Seconds between questions to a silent session."""

PROBE_TIMEOUT = 5.0
"""Seconds such a question may take until the lease counts as lost."""

RELEASE_TIMEOUT = 2.0
"""Seconds for a polite end of the session; after that it is cut, which ends the lock just as well."""


class LeaseHolder:
    """The loop thread's half of a lease: the connection, and the task that asks whether it still lives.

    Made before the lock is asked for, so that a caller cancelled in that moment can still `abandon` what was got.
    """

    def __init__(self, bridge: Bridge, key: str, held: set[LeaseHolder]) -> None:
        self.lost = trio.Event()
        self.key = key
        self._bridge = bridge
        self._held = held
        self._connection: asyncpg.Connection | None = None
        self._watch: asyncio.Task[None] | None = None

    def abandon(self) -> None:
        """Trio side: end it without waiting."""
        with suppress(DatabaseUnavailable):  # the bridge is closed, and the connection with it
            self._bridge.post(self.drop)

    async def take(self, dsn: str, settings: dict[str, str]) -> bool:
        """Ask for the lock; True when it is ours."""
        connection = await asyncpg.connect(dsn, server_settings=settings)
        try:
            if not await connection.fetchval("select pg_try_advisory_lock($1)", _lock_number(self.key)):
                await connection.close(timeout=RELEASE_TIMEOUT)
                return False
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection
        self._held.add(self)
        connection.add_termination_listener(self._on_terminated)
        self._watch = asyncio.get_running_loop().create_task(self._probe(connection))
        return True

    async def release(self) -> None:
        connection = self._detach()
        if connection is None:
            return
        try:
            await connection.close(timeout=RELEASE_TIMEOUT)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            connection.terminate()

    def drop(self) -> None:
        """Loop side: cut the session now."""
        connection = self._detach()
        if connection is not None:
            connection.terminate()

    def _detach(self) -> asyncpg.Connection | None:
        connection, self._connection = self._connection, None
        self._held.discard(self)
        if self._watch is not None:
            self._watch.cancel()
        return connection

    def _on_terminated(self, _connection: object) -> None:
        if self._connection is not None:  # else it was we who ended it
            log.warning("lease_lost", key=self.key)
        self._detach()
        self._bridge.tell(self.lost.set)

    async def _probe(self, connection: asyncpg.Connection) -> None:
        try:
            while True:
                await asyncio.sleep(PROBE_INTERVAL)
                async with asyncio.timeout(PROBE_TIMEOUT):
                    await connection.execute("select 1")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            connection.terminate()  # tells the listener


class Lease:
    """Held leadership. Owned by the task that got it; ends with `release`, the `async with` block, or `lost`.

    `lost` is set when leadership has ended for whatever reason, also by `release`.
    """

    def __init__(self, bridge: Bridge, holder: LeaseHolder) -> None:
        self._bridge = bridge
        self._holder = holder
        self.lost = holder.lost

    async def release(self) -> None:
        """Let another process lead; bounded, and safe to repeat."""
        try:
            await self._bridge.call(self._holder.release, limit=RELEASE_TIMEOUT + 1)
        finally:
            self._holder.abandon()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with trio.move_on_after(2 * RELEASE_TIMEOUT, shield=True), suppress(DatabaseUnavailable):
            await self.release()


def _lock_number(key: str) -> int:
    """A name as the signed 64-bit number that advisory locks take."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
