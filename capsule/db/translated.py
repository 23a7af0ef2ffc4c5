"""The database as use-cases see it: one that is away is the API's own error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

from capsule import errors
from capsule.db.connection import Connection
from capsule.db.errors import DatabaseUnavailable
from capsule.db.pool import Database

NO_ANSWER = "the database does not answer; try again"

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class TranslatedDatabase:
    """`Database`, failing in the API's words."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def run(self, fn: Callable[[Connection, *Ts], Awaitable[T]], *args: *Ts) -> T:
        """`Database.run`; capsule.errors.DatabaseUnavailable."""
        try:
            return await self._db.run(fn, *args)
        except DatabaseUnavailable as err:
            raise errors.DatabaseUnavailable(NO_ANSWER, retry_after=1) from err

    async def transaction(self, fn: Callable[[Connection, *Ts], Awaitable[T]], *args: *Ts) -> T:
        """`Database.transaction`; capsule.errors.DatabaseUnavailable."""
        try:
            return await self._db.transaction(fn, *args)
        except DatabaseUnavailable as err:
            raise errors.DatabaseUnavailable(NO_ANSWER, retry_after=1) from err
