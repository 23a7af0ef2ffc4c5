"""Leadership among the processes on one database: a session-level advisory lock on a connection of its own.

The lock lives exactly as long as the server keeps that session, so a leader that dies is replaced at once. One that
stalls (a stopped process, a Trio loop that hangs) is replaced after STALL_LIMIT: the server ends a session that is
silent for so long, and only Trio's side keeps it from being silent. When such a leader comes back it knows by the clock
that it leads no more, before it has heard so; one that is cut off knows it then, too. An answer that takes its time is
no loss before that. What is on its way to the database in that moment meets compare-and-set.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

import asyncpg
import structlog
import trio

from capsule.db.bridge import Bridge
from capsule.db.errors import DatabaseUnavailable, LeadLost

log = structlog.get_logger()

STALL_LIMIT = 12.0
"""Seconds of silence after which the server ends the session. The others look once a second: it is replaced in 15."""

KEEP_INTERVAL = 3.0
"""Seconds between the leader's questions to its session."""

RELEASE_TIMEOUT = 2.0
"""Seconds for a polite end of the session; after that it is cut, which ends the lock just as well."""

_BROKEN = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # it was released while it was asked: the driver is out of step
)


class LeaseHolder:
    """The loop thread's half of a lease: the connection.

    Made before the lock is asked for, so that a caller cancelled in that moment can still `abandon` what was got.
    """

    def __init__(self, bridge: Bridge, key: str, held: set[LeaseHolder]) -> None:
        self.lost = trio.Event()
        self.key = key
        self._bridge = bridge
        self._held = held
        self._connection: asyncpg.Connection | None = None

    def abandon(self) -> None:
        """Trio side: end it without waiting."""
        with suppress(DatabaseUnavailable):  # the bridge is closed, and the connection with it
            self._bridge.post(self.drop)

    async def take(self, dsn: str, settings: dict[str, str]) -> bool:
        """Ask for the lock; True when it is ours."""
        limit = {"idle_session_timeout": f"{round(STALL_LIMIT * 1000)}ms"}
        connection = await asyncpg.connect(dsn, server_settings=settings | limit)
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
        return True

    async def ask(self, seconds: float) -> bool:
        """Break the session's silence; False when it is over, or does not answer within that time."""
        connection = self._connection
        if connection is None:
            return False
        try:
            async with asyncio.timeout(seconds):
                await connection.execute("select 1")
        except _BROKEN:
            connection.terminate()  # tells the listener
            return False
        return True

    async def release(self) -> None:
        connection = self._detach()
        if connection is None:
            return
        try:
            await connection.close(timeout=RELEASE_TIMEOUT)
        except _BROKEN:
            connection.terminate()

    def drop(self) -> None:
        """Loop side: cut the session now."""
        connection = self._detach()
        if connection is not None:
            connection.terminate()

    def _detach(self) -> asyncpg.Connection | None:
        connection, self._connection = self._connection, None
        self._held.discard(self)
        return connection

    def _on_terminated(self, _connection: object) -> None:
        if self._connection is not None:  # else it was we who ended it
            log.warning("lease_lost", key=self.key)
        self._detach()
        self._bridge.tell(self.lost.set)


class Lease:
    """Held leadership. Owned by the task that got it; ends with `release`, the `async with` block, or `lost`.

    `lost` is set when leadership has ended for whatever reason, also by `release`. Run `keep` beside the leader's work:
    without it the lease ends after STALL_LIMIT.
    """

    def __init__(self, bridge: Bridge, holder: LeaseHolder, asked_at: float) -> None:
        self._bridge = bridge
        self._holder = holder
        self._ours_until = asked_at + STALL_LIMIT
        self.lost = holder.lost

    async def keep(self) -> None:
        """Keep the lease until it is lost. On the very loop that the leader's work is done on: when that hangs, so does
        this."""
        while not self.lost.is_set():
            with trio.move_on_after(KEEP_INTERVAL):
                await self.lost.wait()
            asked_at = now()
            left = max(self._ours_until - asked_at, 0.0)
            try:
                kept = await self._bridge.call(partial(self._holder.ask, left), limit=left + 1)
            except DatabaseUnavailable:
                kept = False
            if kept:
                self._ours_until = asked_at + STALL_LIMIT
            else:
                self._give_up()

    def check(self) -> None:
        """LeadLost when it is over, or may be: nothing was heard of it for as long as the server waits for us."""
        if now() >= self._ours_until:
            self._give_up()
        if self.lost.is_set():
            raise LeadLost("this process leads no more; another one goes on")

    def _give_up(self) -> None:
        if not self.lost.is_set():
            log.warning("lease_given_up", key=self._holder.key)
        self._holder.abandon()
        self.lost.set()

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


def now() -> float:
    """Seconds that also pass while this process, or its machine, is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _lock_number(key: str) -> int:
    """A name as the signed 64-bit number that advisory locks take."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
