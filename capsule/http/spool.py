"""Where an upload waits until all of it is there: little ones in memory, larger ones in unnamed files.

A sandbox must never see half a file (trap 13), and `path` may come after `file` (trap 12): so nothing is passed on
before the last byte has come. Files of any size wait here, too, when they come before their path, within a budget.
"""

from __future__ import annotations

import errno
import tempfile
from contextlib import asynccontextmanager
from functools import partial
from typing import IO, TYPE_CHECKING, TypeVar

import trio

from capsule.errors import Busy
from capsule.http.spool_shares import Budget, Places

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from pathlib import Path
    from uuid import UUID

    from capsule.http.spool_shares import TeamBudget, TeamPlaces

T = TypeVar("T")

MEMORY_BYTES = 128 * 1024
"""An upload up to this size never touches the disk; a thousand of them at once are 128 MiB."""

WRITE_BYTES = 1024 * 1024
"""How much is collected for one write: a hop to a thread costs more than the copy."""

READ_BYTES = 64 * 1024
"""Size of the pieces handed on (agent.wire.limits.MAX_DATA_BYTES)."""

MAX_FILES = 32
"""Uploads on disk at once; at 100 MiB each they need 3.2 GiB."""

LARGE_FILES = 32
"""The same for files of any size, whose bytes are counted."""


class Spool:
    """Hands out upload buffers. One for the whole server."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._disk = trio.CapacityLimiter(4)
        self._places = Places(MAX_FILES)
        self._large_places = Places(LARGE_FILES)
        self._budget = Budget(directory, self._disk)

    @asynccontextmanager
    async def open_large(self, team: UUID, expected: int | None) -> AsyncIterator[SpooledFile]:
        """A buffer for a file of any size: TooLarge or Busy from it when it is beyond the budget; at once, when the
        `expected` number of bytes is."""
        budget = self._budget.of(team)
        if expected is not None and expected > WRITE_BYTES:
            await budget.check(expected)
        spooled = SpooledFile(self._directory, self._disk, self._large_places.of(team), budget)
        try:
            yield spooled
        finally:
            spooled.close()

    @asynccontextmanager
    async def open(self, team: UUID) -> AsyncIterator[SpooledFile]:
        """A buffer that is gone when the block ends, and when the process dies."""
        spooled = SpooledFile(self._directory, self._disk, self._places.of(team))
        try:
            yield spooled
        finally:
            spooled.close()


class SpooledFile:
    """Written once from start to end, then read once from start to end. Busy when there is no place for it."""

    def __init__(
        self, directory: Path, disk: trio.CapacityLimiter, places: TeamPlaces, budget: TeamBudget | None = None
    ) -> None:
        self._directory = directory
        self._disk = disk
        self._places = places
        self._budget = budget
        self._taken = 0
        self._buffer = bytearray()
        self._file: IO[bytes] | None = None
        self._has_place = False
        self.size = 0

    async def write(self, data: bytes) -> None:
        """Append."""
        self._buffer += data
        self.size += len(data)
        if len(self._buffer) > (WRITE_BYTES if self._file else MEMORY_BYTES):
            await self._flush()

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Everything written, in pieces of up to READ_BYTES."""
        if self._file is not None:
            await self._flush()
            await self._run(partial(self._file.seek, 0))
            while block := await self._run(partial(self._file.read, WRITE_BYTES)):
                for start in range(0, len(block), READ_BYTES):
                    yield block[start : start + READ_BYTES]
            return
        for start in range(0, len(self._buffer), READ_BYTES):
            yield bytes(self._buffer[start : start + READ_BYTES])

    def close(self) -> None:
        """Forget it. Closing an unnamed file frees its blocks; that is quick."""
        self._buffer.clear()
        if self._file is not None:
            self._file.close()
        if self._budget is not None:
            self._budget.give_back(self._taken)
            self._taken = 0
        if self._has_place:
            self._places.release()
            self._has_place = False

    async def _flush(self) -> None:
        if self._budget is not None:
            amount = len(self._buffer)
            await self._budget.take(amount, self.size)
            self._taken += amount
        if self._file is None:
            await self._places.acquire()
            self._has_place = True
            self._file = await self._run(self._create)
        data = bytes(self._buffer)
        self._buffer.clear()
        await self._run(partial(self._file.write, data))

    def _create(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._directory)

    async def _run(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread; a full disk is Busy."""
        try:
            return await trio.to_thread.run_sync(work, limiter=self._disk)
        except OSError as err:
            if err.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise Busy("There is no room for uploads now; try again.", retry_after=5) from err
            raise
