"""What the kernel says about one VM's memory, through its userfaultfd: faults to be answered, pages given back.

Owns: the events read and not yet answered. Every way in which a hostile VMM can play with the descriptor it shares
with us ends here, at worst in FaultUnserved.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import trio

from agent.pager import abi
from agent.pager.abi import PAGE, Userfault
from agent.pager.faults import REMOVED, PageMap
from agent.pager.filling import Again, FaultUnserved, Filler

if TYPE_CHECKING:
    from agent.pager.regions import RegionMap

EVENTS_AT_ONCE = 64
AGAIN_PAUSE = 0.0005
"""Seconds until what the kernel could not do yet is tried again."""
SPURIOUS_LIMIT = 64
"""Wake-ups in a row without an event. Withdrawn faults make some; a VMM that plays with its descriptor makes many."""


class Fault(NamedTuple):
    """`heard`: on the clock of time.perf_counter."""

    address: int
    flags: int
    heard: float


class Events:
    """See the module. `waiting`: the faults, oldest first; the reader takes them out."""

    def __init__(self, userfault: Userfault, regions: RegionMap, pages: PageMap, filler: Filler) -> None:
        self.waiting: deque[Fault] = deque()
        self._userfault = userfault
        self._regions = regions
        self._pages = pages
        self._filler = filler
        self._buffer = bytearray(abi.EVENT.size * EVENTS_AT_ONCE)
        self._removed: deque[tuple[int, int]] = deque()
        self._spurious = 0

    def read(self) -> bool:
        """Take what events there are, without waiting; whether a fault waits for its answer. Raises FaultUnserved."""
        try:
            size = self._userfault.read_events(self._buffer)
        except BlockingIOError:
            return bool(self.waiting)
        except OSError as err:
            raise FaultUnserved(f"the VMM's userfaultfd cannot be read: {err.strerror}") from err
        self._spurious = 0
        heard = time.perf_counter()
        for at in range(0, size, abi.EVENT.size):
            event, first, second, _ = abi.EVENT.unpack_from(self._buffer, at)
            if event == abi.EVENT_PAGEFAULT:
                self.waiting.append(Fault(second, first, heard))
            else:
                self._hear(event, first, second)
        if self._removed:
            self._count_removed()
        return bool(self.waiting)

    async def wait(self) -> None:
        """Wait until there may be something to read. Raises FaultUnserved."""
        if self._removed:
            await trio.sleep(AGAIN_PAUSE)
            self._count_removed()
            return
        self._spurious += 1
        if self._spurious > 2:
            os.set_blocking(self._userfault.fd, False)  # the VMM shares it; a blocking one looks always readable
            await trio.sleep(AGAIN_PAUSE * self._spurious)
        if self._spurious > SPURIOUS_LIMIT:
            raise FaultUnserved("the VMM's userfaultfd is always ready and has never anything to say")
        await trio.lowlevel.wait_readable(self._userfault.fd)

    def _hear(self, event: int, first: int, second: int) -> None:
        if event in {abi.EVENT_REMOVE, abi.EVENT_UNMAP}:
            for offset, length in self._regions.clip(first, second):
                self._pages.mark(offset // PAGE, length // PAGE, REMOVED)
                self._removed.append((offset, length))
            return
        if event == abi.EVENT_FORK:
            os.close(first)  # reading the event has made a descriptor of ours
        raise FaultUnserved(f"the VMM does with its memory what cannot be followed (event {event:#x})")

    def _count_removed(self) -> None:
        """What was given back counts as written. What the kernel cannot do yet stays for the next time."""
        for _ in range(len(self._removed)):
            offset, length = self._removed.popleft()
            region = self._regions.at_offset(offset)
            try:
                self._filler.count_as_written(region, offset // PAGE, length // PAGE)
            except Again:
                self._removed.append((offset, length))
