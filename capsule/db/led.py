"""The database as a leader uses it: not a moment longer than it leads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

from capsule.db.connection import Connection
from capsule.db.driver import Isolation
from capsule.db.lease import Lease
from capsule.db.pool import Database

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class LedDatabase(Database):
    """`db`, as long as `lease` lasts; after that every use raises LeadLost, which is a DatabaseUnavailable."""

    def __init__(self, db: Database, lease: Lease) -> None:
        self._db = db
        self._lease = lease

    async def transaction(
        self,
        fn: Callable[[Connection, *Ts], Awaitable[T]],
        *args: *Ts,
        timeout: float = 10.0,  # noqa: ASYNC109 - as in Database
        isolation: Isolation = "read_committed",
    ) -> T:
        """As Database's."""
        self._lease.check()
        return await self._db.transaction(fn, *args, timeout=timeout, isolation=isolation)

    async def run(
        self,
        fn: Callable[[Connection, *Ts], Awaitable[T]],
        *args: *Ts,
        timeout: float = 10.0,  # noqa: ASYNC109 - as in Database
    ) -> T:
        """As Database's."""
        self._lease.check()
        return await self._db.run(fn, *args, timeout=timeout)
