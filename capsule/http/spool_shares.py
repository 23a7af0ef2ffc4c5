"""What the spool has room for, and how much of it one team may hold: half, so that others never find it full of one's.

A team's share lasts as long as one of its uploads.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import trio

from capsule.errors import Busy, TooLarge

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

LARGE_BYTES = 4 * 1024 * 1024 * 1024
"""Of files of any size together; never more than half of what is free on the disk."""

PLACE_TIMEOUT = 30.0
"""Seconds an upload waits for its turn before the client is told to try again."""


class Places:
    """So many files on the disk at once."""

    def __init__(self, total: int) -> None:
        self._free = trio.Semaphore(total)
        self._share = total // 2
        self._teams: WeakValueDictionary[UUID, TeamPlaces] = WeakValueDictionary()

    def of(self, team: UUID) -> TeamPlaces:
        """A team's. The same for all who hold it."""
        if (found := self._teams.get(team)) is None:
            found = self._teams[team] = TeamPlaces(self._free, self._share)
        return found


class TeamPlaces:
    """The places that one team may have."""

    def __init__(self, free: trio.Semaphore, share: int) -> None:
        self._free = free
        self._own = trio.Semaphore(share)

    async def acquire(self) -> None:
        """Wait for one. Busy after PLACE_TIMEOUT."""
        with trio.move_on_after(PLACE_TIMEOUT):
            await self._own.acquire()
            try:
                await self._free.acquire()
            except trio.Cancelled:
                self._own.release()
                raise
            return
        raise Busy("Too many uploads at once; try again.", retry_after=PLACE_TIMEOUT)

    def release(self) -> None:
        """Let the next one in."""
        self._free.release()
        self._own.release()


class Budget:
    """Bytes on the disk that uploads of any size hold together."""

    def __init__(self, directory: Path, disk: trio.CapacityLimiter) -> None:
        self._directory = directory
        self._disk = disk
        self._teams: WeakValueDictionary[UUID, TeamBudget] = WeakValueDictionary()
        self.held = 0

    def of(self, team: UUID) -> TeamBudget:
        """A team's. The same for all who hold it."""
        if (found := self._teams.get(team)) is None:
            found = self._teams[team] = TeamBudget(self)
        return found

    async def room(self) -> int:
        """For all together: LARGE_BYTES, and never more than is free beside it."""
        disk = await trio.to_thread.run_sync(os.statvfs, self._directory, limiter=self._disk)
        return min(LARGE_BYTES, (disk.f_bavail * disk.f_frsize + self.held) // 2)


class TeamBudget:
    """The bytes of it that one team holds."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.held = 0

    async def check(self, total: int) -> None:
        """TooLarge when a file of `total` bytes would not fit, were it the only one."""
        _refuse_beyond(await self._budget.room() // 2, total)

    async def take(self, amount: int, total: int) -> None:
        """Hold `amount` more for a file that has `total` bytes then. TooLarge, Busy."""
        room = await self._budget.room()
        _refuse_beyond(room // 2, total)
        if self._budget.held + amount > room or self.held + amount > room // 2:
            raise Busy(
                "There is no room now for files that come before their path; send the part `path` before `file`.",
                retry_after=PLACE_TIMEOUT,
            )
        self._budget.held += amount
        self.held += amount

    def give_back(self, amount: int) -> None:
        """Let go."""
        self._budget.held -= amount
        self.held -= amount


def _refuse_beyond(room: int, total: int) -> None:
    if total > room:
        raise TooLarge(
            f"A file that comes before its path may have {room} bytes at most; send the part `path` before `file`, and"
            " it may have any size.",
            limit=room,
        )
