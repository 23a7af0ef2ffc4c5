"""The one door to PostgreSQL: `Database` runs whole use-cases of queries on the driver's thread for Trio tasks.

One crossing per use-case, not per statement: `await db.transaction(fn, …)` carries an `async def fn(tx, …)` over to the
loop thread, where a connection is taken, the transaction begun, `fn` run, committed, and the connection given back in
one coroutine. So `fn` awaits nothing but its `tx`, and touches no Trio object.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar, TypeVarTuple

import trio

from capsule.db.bridge import Bridge, open_bridge
from capsule.db.connection import Connection
from capsule.db.driver import CLOSE_TIMEOUT, SERVER_SETTINGS, DatabaseStatistics, Driver, Isolation, ping
from capsule.db.errors import DatabaseUnavailable
from capsule.db.lease import Lease, LeaseHolder, now

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CROSSING_MARGIN = 2.0
"""Seconds beyond a call's time-out after which its Trio task stops believing in the thread."""


class Database:
    """Runs transactions against one PostgreSQL, however often that comes and goes.

    Owns: the connection pool and the leases, on the bridge's thread. Owned by: the `open_database` block. Dies when the
    block ends, within CLOSE_TIMEOUT plus the bridge's STOP_GRACE.
    """

    def __init__(self, bridge: Bridge, driver: Driver) -> None:
        self._bridge = bridge
        self._driver = driver
        self._leases: set[LeaseHolder] = set()

    async def transaction(
        self,
        fn: Callable[[Connection, *Ts], Awaitable[T]],
        *args: *Ts,
        timeout: float = 10.0,  # noqa: ASYNC109 - enforced on the other thread, clean-up included
        isolation: Isolation = "read_committed",
    ) -> T:
        """Run `fn(tx, *args)` in one transaction and return its result; an exception rolls back and is raised here.

        `fn` is run again, from the start, when the server could not serialize it: it must have no other effects.
        Raises DatabaseUnavailable (nothing within `timeout` seconds), ConstraintViolated, and whatever `fn` raises.
        """
        return await self._call(partial(self._driver.transact, fn, args, isolation), timeout)

    async def run(
        self,
        fn: Callable[[Connection, *Ts], Awaitable[T]],
        *args: *Ts,
        timeout: float = 10.0,  # noqa: ASYNC109 - as above
    ) -> T:
        """Run `fn(connection, *args)` without a transaction: each statement stands alone. Never retried."""
        return await self._call(partial(self._driver.borrow, fn, args), timeout)

    async def ping(self, *, timeout: float = 3.0) -> None:  # noqa: ASYNC109 - as above
        """Return when the server has answered; raises DatabaseUnavailable."""
        await self.run(ping, timeout=timeout)

    async def wait_available(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - as above
        """Ping until there is an answer; raises DatabaseUnavailable with the last cause after `timeout` seconds."""
        deadline = trio.current_time() + timeout
        pause = 0.02
        while True:
            remaining = deadline - trio.current_time()
            try:
                await self.ping(timeout=max(0.1, min(3.0, remaining)))
            except DatabaseUnavailable:
                if trio.current_time() + pause >= deadline:
                    raise
                await trio.sleep(pause)
                pause = min(pause * 2, 1.0)
            else:
                return

    async def try_lead(self, key: str, *, timeout: float = 10.0) -> Lease | None:  # noqa: ASYNC109 - as above
        """Become the one leader for `key` among all processes on this database, or return None at once.

        Use as `async with lease:`, run `lease.keep`, write through a `LedDatabase`, and stop leading when `lease.lost`
        is set.
        """
        holder = LeaseHolder(self._bridge, key, self._leases)
        taken, asked_at = False, now()
        try:
            taken = await self._call(partial(holder.take, self._driver.dsn, SERVER_SETTINGS), timeout)
        finally:
            if not taken:
                holder.abandon()
        return Lease(self._bridge, holder, asked_at) if taken else None

    def statistics(self) -> DatabaseStatistics:
        """A consistent enough picture for a gauge; read from another thread than the one that counts."""
        return self._driver.statistics()

    async def _call(self, work: Callable[[], Awaitable[T]], timeout: float) -> T:  # noqa: ASYNC109 - as above
        return await self._bridge.call(partial(self._driver.bounded, work, timeout), limit=timeout + CROSSING_MARGIN)

    async def close_connections(self) -> None:
        """Loop side, at the end of `open_database`."""
        for lease in list(self._leases):
            lease.drop()
        await self._driver.close()


@asynccontextmanager
async def open_database(dsn: str, *, min_size: int = 1, max_size: int = 10) -> AsyncIterator[Database]:
    """The database at `dsn` for the length of the block; it need not be up yet.

    `max_size` bounds the connections of this process (leases have one more each); `min_size` of them are made ahead.
    """
    async with open_bridge() as bridge:
        driver = Driver(dsn, min_size=min_size, max_size=max_size)
        database = Database(bridge, driver)
        await bridge.call(driver.open, limit=CROSSING_MARGIN)
        try:
            yield database
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT + CROSSING_MARGIN, shield=True), suppress(DatabaseUnavailable):
                await bridge.call(database.close_connections, limit=CLOSE_TIMEOUT + CROSSING_MARGIN)
