"""Where an upload waits until all of it is there: little ones in memory, larger ones in unnamed files.

A sandbox must never see half a file (trap 13), and `path` may come after `file` (trap 12): so nothing is passed on
before the last byte has come.
"""

from __future__ import annotations

import errno
import tempfile
from contextlib import asynccontextmanager
from functools import partial
from typing import IO, TYPE_CHECKING, TypeVar

import trio

from capsule.errors import Busy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

T = TypeVar("T")

MEMORY_BYTES = 128 * 1024
"""An upload up to this size never touches the disk; a thousand of them at once are 128 MiB."""

WRITE_BYTES = 1024 * 1024
"""How much is collected for one write: a hop to a thread costs more than the copy."""

READ_BYTES = 64 * 1024
"""Size of the pieces handed on (agent.wire.limits.MAX_DATA_BYTES)."""

MAX_FILES = 32
"""Uploads on disk at once; at 100 MiB each they need 3.2 GiB."""

SLOT_TIMEOUT = 30.0
"""Seconds an upload waits for its turn before the client is told to try again."""


class Spool:
    """Hands out upload buffers. One for the whole server."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._slots = trio.Semaphore(MAX_FILES)
        self._disk = trio.CapacityLimiter(4)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[SpooledFile]:
        """A buffer that is gone when the block ends, and when the process dies."""
        spooled = SpooledFile(self._directory, self._slots, self._disk)
        try:
            yield spooled
        finally:
            spooled.close()


class SpooledFile:
    """Written once from start to end, then read once from start to end. Busy when there is no place for it."""

    def __init__(self, directory: Path, slots: trio.Semaphore, disk: trio.CapacityLimiter) -> None:
        self._directory = directory
        self._slots = slots
        self._disk = disk
        self._buffer = bytearray()
        self._file: IO[bytes] | None = None
        self._has_slot = False
        self.size = 0

    async def write(self, data: bytes) -> None:
        """Append."""
        self._buffer += data
        self.size += len(data)
        if len(self._buffer) > (WRITE_BYTES if self._file else MEMORY_BYTES):
            await self._flush()

    async def chunks(self) -> AsyncIterator[bytes]:
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
        if self._has_slot:
            self._slots.release()
            self._has_slot = False

    async def _flush(self) -> None:
        if self._file is None:
            await self._take_slot()
            self._file = await self._run(self._create)
        data = bytes(self._buffer)
        self._buffer.clear()
        await self._run(partial(self._file.write, data))

    async def _take_slot(self) -> None:
        with trio.move_on_after(SLOT_TIMEOUT):
            await self._slots.acquire()
            self._has_slot = True
        if not self._has_slot:
            raise Busy("Too many uploads at once; try again.", retry_after=SLOT_TIMEOUT)

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
