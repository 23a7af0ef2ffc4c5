"""The part of a database connection that query functions use; the driver's own satisfies it.

Written down here so that the queries depend on no driver and can be run against a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol


class Record(Protocol):
    """One row: values by column name, in the order of the statement."""

    def __getitem__(self, key: str, /) -> Any: ...
    def items(self) -> Iterator[tuple[str, Any]]: ...


class Connection(Protocol):
    """Runs statements; parameters are `$1`, `$2`, … and never part of the text.

    UUIDs, datetimes (aware), ints, str, bytes and lists of them are passed as they are; `jsonb` takes and gives plain
    dicts, `inet` takes and gives text.
    """

    async def execute(self, query: str, /, *args: Any) -> str:
        """Run and return the command tag, for example `UPDATE 1`."""

    async def fetch(self, query: str, /, *args: Any) -> list[Any]:
        """All rows."""

    async def fetchrow(self, query: str, /, *args: Any) -> Any | None:
        """The first row, or None."""

    async def fetchval(self, query: str, /, *args: Any) -> Any:
        """The first column of the first row, or None."""

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """A transaction, or a savepoint inside one."""
