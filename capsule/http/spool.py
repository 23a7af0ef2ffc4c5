"""Where an upload waits until all of it is there: little ones in memory, larger ones in unnamed files.

A sandbox must never see half a file (trap 13), and `path` may come after `file` (trap 12): so nothing is passed on
before the last byte has come. Files of any size wait here, too, when they come before their path, within a budget.
"""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import asynccontextmanager
from functools import partial
from typing import IO, TYPE_CHECKING, TypeVar

import trio

from capsule.errors import Busy, TooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
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

LARGE_BYTES = 4 * 1024 * 1024 * 1024
"""Of files of any size together; never more than half of what is free on the disk."""

LARGE_FILES = 32
"""Of those on disk at once."""

SLOT_TIMEOUT = 30.0
"""Seconds an upload waits for its turn before the client is told to try again."""


class Spool:
    """Hands out upload buffers. One for the whole server."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._slots = trio.Semaphore(MAX_FILES)
        self._disk = trio.CapacityLimiter(4)
        self._large_slots = trio.Semaphore(LARGE_FILES)
        self._budget = Budget(directory, self._disk)

    @asynccontextmanager
    async def open_large(self, expected: int | None) -> AsyncIterator[SpooledFile]:
        """A buffer for a file of any size: TooLarge or Busy from it when it is beyond the budget; at once, when the
        `expected` number of bytes is."""
        if expected is not None and expected > WRITE_BYTES:
            await self._budget.check(expected)
        spooled = SpooledFile(self._directory, self._large_slots, self._disk, self._budget)
        try:
            yield spooled
        finally:
            spooled.close()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[SpooledFile]:
        """A buffer that is gone when the block ends, and when the process dies."""
        spooled = SpooledFile(self._directory, self._slots, self._disk)
        try:
            yield spooled
        finally:
            spooled.close()


class Budget:
    """Bytes on the disk that uploads of any size hold together."""

    def __init__(self, directory: Path, disk: trio.CapacityLimiter) -> None:
        self._directory = directory
        self._disk = disk
        self.held = 0

    async def check(self, total: int) -> None:
        """TooLarge when a file of `total` bytes would not fit, were it the only one."""
        _refuse_beyond(await self._room(), total)

    async def take(self, amount: int, total: int) -> None:
        """Hold `amount` more for a file that has `total` bytes then. TooLarge, Busy."""
        room = await self._room()
        _refuse_beyond(room, total)
        if self.held + amount > room:
            raise Busy(
                "There is no room now for files that come before their path; send the part `path` before `file`.",
                retry_after=SLOT_TIMEOUT,
            )
        self.held += amount

    def give_back(self, amount: int) -> None:
        """Let go."""
        self.held -= amount

    async def _room(self) -> int:
        """Of all together: LARGE_BYTES, and never more than is free beside it."""
        disk = await trio.to_thread.run_sync(os.statvfs, self._directory, limiter=self._disk)
        return min(LARGE_BYTES, (disk.f_bavail * disk.f_frsize + self.held) // 2)


def _refuse_beyond(room: int, total: int) -> None:
    if total > room:
        raise TooLarge(
            f"A file that comes before its path may have {room} bytes at most; send the part `path` before `file`, and"
            " it may have any size.",
            limit=room,
        )


class SpooledFile:
    """Written once from start to end, then read once from start to end. Busy when there is no place for it."""

    def __init__(
        self, directory: Path, slots: trio.Semaphore, disk: trio.CapacityLimiter, budget: Budget | None = None
    ) -> None:
        self._budget = budget
        self._taken = 0
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
        if self._has_slot:
            self._slots.release()
            self._has_slot = False

    async def _flush(self) -> None:
        if self._budget is not None:
            amount = len(self._buffer)
            await self._budget.take(amount, self.size)
            self._taken += amount
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
