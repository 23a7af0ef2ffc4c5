"""What to do about a page fault: decisions without I/O, over a map with one byte per page of guest memory."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from agent.pager.abi import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK = 64 * 1024
"""Bytes brought in around a fault: at 4 KiB the way to the pager and back costs ten times what the copying does, above
64 KiB there is little more to win, and what nobody needs takes memory."""

ABSENT, PRESENT, REMOVED = 0, 1, 2
"""States of a page: still the snapshot's; in the VM's memory; given back by the VMM, so zeros from then on."""


PIECE = 2 * CHUNK
"""Bytes brought in one step when nobody waits for them."""
MOST_AHEAD = 16
"""Chunks brought ahead of a thread that goes through memory in order: 1 MiB."""
STREAMS = 8
"""How many such threads of one VM are followed."""


class Action(Enum):
    """What a fault asks for."""

    BRING = auto()
    """The pages of the snapshot."""
    ZERO = auto()
    """Zeros, which count as written: they are not what the snapshot has there."""
    PROBE = auto()
    """The page should be there. Either it has just come (then the waiting thread is woken), or the VMM has punched a
    hole without a word: zeros, then."""


class Decision(NamedTuple):
    """`runs`: (first page, count) each, ascending; the fault's own page is among them."""

    action: Action
    runs: tuple[tuple[int, int], ...]


class PageMap:
    """Which pages of a guest's memory are where."""

    def __init__(self, memory_bytes: int) -> None:
        self.pages = memory_bytes // PAGE
        self._states = bytearray(self.pages)

    def state(self, page: int) -> int:
        """ABSENT, PRESENT or REMOVED."""
        return self._states[page]

    def mark(self, first: int, count: int, state: int) -> None:
        """Note what became of a run of pages."""
        if count == 1:
            self._states[first] = state
        else:
            self._states[first : first + count] = bytes((state,)) * count

    def mark_bytes(self, ranges: Iterable[tuple[int, int]], state: int) -> None:
        """The same for (offset, length) in bytes."""
        for offset, length in ranges:
            self.mark(offset // PAGE, length // PAGE, state)

    def runs(self, state: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs (first page, count) of pages in `state` from page `first` to before `end`."""
        states = self._states
        start = states.find(state, first, end)
        while start >= 0:
            stop = start + 1
            while stop < end and states[stop] == state:
                stop += 1
            yield start, stop - start
            start = states.find(state, stop, end)

    def decide(self, page: int, low: int, high: int) -> Decision:
        """What to do about a fault at `page`, which lies in a region of the pages `low` to before `high`."""
        state = self._states[page]
        if state == PRESENT:
            return Decision(Action.PROBE, ((page, 1),))
        first = max(low, page - page % (CHUNK // PAGE))
        end = min(high, page - page % (CHUNK // PAGE) + CHUNK // PAGE)
        if state == REMOVED:
            run = next(run for run in self.runs(REMOVED, first, end) if run[0] <= page < run[0] + run[1])
            return Decision(Action.ZERO, (run,))
        if self._states.count(ABSENT, first, end) == end - first:
            return Decision(Action.BRING, ((first, end - first),))
        return Decision(Action.BRING, tuple(self.runs(ABSENT, first, end)))


class Streams:
    """Recognises threads that go through memory in order, and says how far ahead of them to bring chunks.

    As the kernel's read-ahead does: twice as far each time the guess was right. A chunk's number is its offset / CHUNK.
    """

    def __init__(self) -> None:
        self._expected: dict[int, int] = {}
        """Chunk that comes next -> how far was brought ahead of it; oldest first."""

    def ahead(self, chunk: int) -> range:
        """The chunks to bring after `chunk`, in which a fault was; none unless it continues a stream."""
        known = self._expected.pop(chunk, None)
        count = 0 if known is None else min(MOST_AHEAD, max(2, known * 2))
        following = range(chunk + 1, chunk + 1 + count)
        if len(self._expected) >= STREAMS:
            del self._expected[next(iter(self._expected))]
        self._expected[following.stop] = count
        return following
