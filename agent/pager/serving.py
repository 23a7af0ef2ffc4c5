"""Answers the page faults of one VM.

Owns: the VM's events. Owned by: the VM's task, which runs `prefetch` and then `serve`.
Takes: events of the userfaultfd. Emits: nothing; its figures are read by others. Dies when: its task is cancelled (the
VMM has ended or is released), or a fault cannot be answered (FaultUnserved, or what the reader raises).

One chunk is one step: after it every other VM has its turn. What is not in the page cache is read in a thread, while
the other VMs go on.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import structlog
import trio

from agent.pager import abi
from agent.pager.abi import PAGE, Userfault
from agent.pager.events import AGAIN_PAUSE, Events, Fault
from agent.pager.faults import ABSENT, CHUNK, PIECE, PRESENT, Action, PageMap, Streams
from agent.pager.figures import Figures
from agent.pager.filling import Again, FaultUnserved, Filler, OutOfMemory, Staging, VmGone
from agent.pager.guest_file import GuestFile
from agent.pager.recording import RECORDED_FAULTS, Recorder
from agent.snapshots.errors import SnapshotDamaged, StoreFailed, WouldBlock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agent.pager.regions import Region, RegionMap
    from agent.pager.snapshot import MemorySource

log = structlog.get_logger()

PIECES_PER_TURN = 8
"""Pieces of a working set, most of which are single pages, brought in without giving way."""
MEMORY_PAUSE = 0.05
MEMORY_TRIES = 40


class Piece(NamedTuple):
    """Pages to be brought in though nobody has asked: those from `first` to before `end`, at most PIECE."""

    region: Region
    first: int
    end: int


class Memory(NamedTuple):
    """What a VM's memory is made of and where it goes to."""

    regions: RegionMap
    source: MemorySource
    pages: PageMap
    file: GuestFile | None


class Shared(NamedTuple):
    """What all VMs of a pager use: only one of them works at a time."""

    staging: Staging
    zeros: Staging
    readers: trio.CapacityLimiter


class FaultServer:
    """See the module."""

    def __init__(self, userfault: Userfault, memory: Memory, shared: Shared, recorder: Recorder) -> None:
        """While `recorder` is active, neighbours are brought in without being mapped, so that the page table tells what
        was touched."""
        self.figures = Figures()
        self._recorder = recorder
        self._userfault = userfault
        self._memory = memory
        self._shared = shared
        self._filler = Filler(userfault, memory.pages, shared.zeros)
        self._events = Events(userfault, memory.regions, memory.pages, self._filler)
        self._ahead: deque[Piece] = deque()
        self._streams = Streams()
        self._memory_tries = 0

    async def serve(self) -> None:
        """Answer faults until cancelled or the VMM's memory is gone.

        Raises FaultUnserved, SnapshotDamaged, StoreFailed.
        """
        worked = False
        try:
            while True:
                asked = bool(self._events.waiting) or self._events.read()
                if not asked and not self._ahead:
                    await self._events.wait()
                    worked = False
                    continue
                if worked:  # one chunk is one turn: the others may have waited for it
                    await trio.lowlevel.checkpoint()
                if asked:
                    await self._answer_next()
                else:
                    await self._read_ahead()
                worked = True
        except VmGone:
            await trio.sleep_forever()  # whoever watches the process is about to say so

    async def _read_ahead(self) -> None:
        try:
            await self._bring_piece(self._ahead.popleft())
        except (SnapshotDamaged, StoreFailed):
            self._ahead.clear()  # perhaps nobody will ever ask for it

    async def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Bring in parts of the memory, (offset, length) in bytes, answering faults meanwhile. Raises as `serve`."""
        done = 0
        try:
            for piece in self._pieces(ranges):
                await self._bring_piece(piece)
                done += 1
                if done % PIECES_PER_TURN == 0:
                    self._events.read()
                    while self._events.waiting:
                        await self._answer_next()
                        await trio.lowlevel.checkpoint()
                    await trio.lowlevel.checkpoint()
        except VmGone:
            await trio.sleep_forever()

    def wake_all(self) -> None:
        """Have every waiting thread of the VMM fault again: who heard of its fault may be gone."""
        for region in self._memory.regions.regions:
            with suppress(OSError):  # it is ending
                self._userfault.wake(region.address, region.size)

    # --- answers -----------------------------------------------------------------------------------------------

    async def _answer_next(self) -> None:
        fault = self._events.waiting[0]
        try:
            try:
                self._answer(fault, None)
            except WouldBlock:
                await self._answer_from_disk(fault)
        except Again:
            await trio.sleep(AGAIN_PAUSE)
            self._events.read()
            return
        except OutOfMemory:
            self._memory_tries += 1
            if self._memory_tries > MEMORY_TRIES:
                raise FaultUnserved("there is no memory for a page: the VM's limit or the host's is reached") from None
            await trio.sleep(MEMORY_PAUSE)
            return
        self._memory_tries = 0
        self._events.waiting.popleft()
        self.figures.answered(time.perf_counter() - fault.heard)
        self.figures.fault_bytes = self._filler.bytes - self.figures.prefetched_bytes
        if self._recorder.active and self.figures.faults >= RECORDED_FAULTS:
            await self._recorder.finish()

    def _answer(self, fault: Fault, read: Staging | None) -> None:
        """Answer from `read`, which holds the chunk, or else from the page cache. Raises WouldBlock."""
        region, page, low, high = self._place(fault.address)
        if fault.flags & (abi.PAGEFAULT_FLAG_WP | abi.PAGEFAULT_FLAG_MINOR):
            self._answer_other(fault)
            return
        action, runs = self._memory.pages.decide(page, low, high)
        if action is not Action.BRING:
            for first, count in runs:
                self._filler.zero(region, first, count)
            return
        chunk = page - page % (CHUNK // PAGE)
        staging = read or self._shared.staging
        if read is None:
            self._read(runs, chunk, staging, wait=False)
        self._recorder.note([(page * PAGE, PAGE)])
        if self._recorder.active and self._memory.file is not None:
            self._filler.bring(region, page, 1, staging.address + (page - chunk) * PAGE)
            runs = tuple(self._memory.pages.runs(ABSENT, runs[0][0], sum(runs[-1])))
        for first, count in runs:
            self._bring(region, first, count, staging, (first - chunk) * PAGE)
        self._plan_ahead(chunk)

    def _bring(self, region: Region, first: int, count: int, staging: Staging, at: int) -> None:
        """Put pages from offset `at` of the staging buffer into the VM: while recording, without mapping them."""
        if self._recorder.active and self._memory.file is not None:
            self._put(first, staging.view[at : at + count * PAGE])
        else:
            self._filler.bring(region, first, count, staging.address + at)

    def _plan_ahead(self, page: int) -> None:
        """A fault was answered in the chunk that begins at `page`: what will be asked for next?"""
        if self._ahead and self._ahead[0].first <= page + CHUNK // PAGE and page < self._ahead[-1].end:
            return  # a stream that has caught up with us
        ahead = self._streams.ahead(page * PAGE // CHUNK)
        if ahead:
            self._ahead = deque(self._pieces([(ahead.start * CHUNK, len(ahead) * CHUNK)]))

    def _answer_other(self, fault: Fault) -> None:
        """A VMM that registered for more than it should is not left hanging."""
        page = fault.address - fault.address % PAGE
        try:
            if fault.flags & abi.PAGEFAULT_FLAG_WP:
                self._userfault.write_unprotect(page, PAGE)
            else:
                self._userfault.proceed(page, PAGE)
        except OSError as err:
            if err.errno == errno.EAGAIN:
                raise Again from None
            if err.errno != errno.EEXIST:
                raise FaultUnserved(f"the kernel refused a page: {err.strerror}") from err

    async def _answer_from_disk(self, fault: Fault) -> None:
        """The same, with the data read in a thread first: only this VM waits for the disk."""
        _, page, low, high = self._place(fault.address)
        staging = Staging()
        _, runs = self._memory.pages.decide(page, low, high)
        chunk = page - page % (CHUNK // PAGE)
        work = partial(self._read, runs, chunk, staging, wait=True)
        await trio.to_thread.run_sync(work, limiter=self._shared.readers)
        self._answer(fault, staging)

    def _place(self, address: int) -> tuple[Region, int, int, int]:
        """The region of an address, its page in the guest's memory, and the region's first and last page + 1."""
        region = self._memory.regions.find(address)
        if region is None:
            raise FaultUnserved(f"the VMM reports a fault at {address:#x}, which is no memory of its guest")
        low = region.offset // PAGE
        return region, (region.offset + address - region.address) // PAGE, low, low + region.size // PAGE

    def _read(self, runs: Iterable[tuple[int, int]], chunk: int, staging: Staging, *, wait: bool) -> None:
        """Fill in the pages of `runs`, each at its place in the chunk. Raises WouldBlock, SnapshotDamaged."""
        for first, count in runs:
            at = (first - chunk) * PAGE
            self._memory.source.read_into(first * PAGE, staging.view[at : at + count * PAGE], wait=wait)

    # --- before they are asked for -----------------------------------------------------------------------------

    def _pieces(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Piece]:
        """Cut ranges, (offset, length) in bytes, to the regions and to PIECE."""
        for offset, length in ranges:
            for region in self._memory.regions.regions:
                low, high = max(offset, region.offset), min(offset + length, region.offset + region.size)
                for begin in range(low, high, PIECE):
                    yield Piece(region, begin // PAGE, min(begin + PIECE, high) // PAGE)

    async def _bring_piece(self, piece: Piece) -> None:
        region, first, end = piece
        runs = tuple(self._memory.pages.runs(ABSENT, first, end))
        staging = self._shared.staging
        try:
            self._read(runs, first, staging, wait=False)
        except WouldBlock:
            staging = Staging()
            work = partial(self._read, runs, first, staging, wait=True)
            await trio.to_thread.run_sync(work, limiter=self._shared.readers)
        before = self._filler.bytes
        try:
            for run_first, count in runs:
                self._bring(region, run_first, count, staging, (run_first - first) * PAGE)
                self._recorder.note([(run_first * PAGE, count * PAGE)])
        except (Again, OutOfMemory):
            pass  # it comes when it is asked for
        finally:
            self.figures.prefetched_bytes += self._filler.bytes - before

    def _put(self, first: int, view: memoryview) -> None:
        """Put pages into the memory file, without mapping them. What does not fit stays absent."""
        assert self._memory.file is not None  # noqa: S101 - asked for by both callers
        try:
            written = self._memory.file.write(first * PAGE, view)
        except OSError as err:
            log.warning("guest_file_not_writable", error=str(err))
            self._memory = self._memory._replace(file=None)
            self._recorder.drop()
            return
        self._memory.pages.mark(first, written // PAGE, PRESENT)
        self._filler.bytes += written
