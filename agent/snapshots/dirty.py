"""Which pages of a VM's memory differ from its parent's: asked of the kernel, or found by comparing.

Resident is not dirty: pages that were only fetched are in the memory file, and most of them are the parent's.

A hole of the memory file means, in memory that is demand-paged (a restored VM's), a page that was never fetched, so the
parent's - unless the VM removed it, which only its pager knows; then it is zero. In other memory (a booted VM's) a hole
is zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.snapshots import pagemap
from agent.snapshots.capture import Content
from agent.snapshots.comparison import Comparison, Kind, spans
from agent.snapshots.header import NIL, Header
from agent.snapshots.memory_file import GuestMemory, data_within, holes_within, read_exactly
from agent.snapshots.pagemap import Mapping, NotTracked, Range, ScanUnsupported, merge


class Parent(Content, Protocol):
    """A memory that can be read and has a header; `memory.MemoryReader`."""

    @property
    def header(self) -> Header:
        """Which parts of it are zeros, among other things."""
        ...


@dataclass(frozen=True, slots=True)
class Descent:
    """What a VM's memory was before, and what is known besides its pages."""

    parent: Parent | None
    """The generation that changes are counted from; None: all zeros, and everything that is there is dirty."""
    demand_paged: bool
    """Whether the VM was restored: holes are pages of the parent then."""
    removed: Sequence[Range] = ()
    """What the VM has removed since it was restored, as its pager was told, in any order. Writing is noticed by the
    kernel, removing is not."""


class DirtyPages(Protocol):
    """Finds the pages to capture. Blocks; for a thread. The VM's process lives and its vCPUs stand, except for `take`.

    Ranges are ascending and apart; their holes are zeros to the guest. Raises what pagemap.written raises,
    SourceUnreadable and, of the parent, DataDamaged.
    """

    exact: bool
    """Whether every page of the ranges is known to differ from the parent's: capture need not compare."""

    def ranges(self) -> list[Range]:
        """Return all pages that may differ from the parent's."""
        ...

    def reset(self) -> None:
        """Count from here: what is written from now on differs from a parent that is being made of this state.

        What was known is gone, and the kernel remembers no parent: before, note where a crash leaves it that the
        kernel's answer is good for no parent (ContentDirty is), and undo the note once the new parent is there.
        """
        ...

    def take(self) -> list[Range]:
        """`ranges` and `reset` in one step: of writes that go on meanwhile, each is in this answer or in the next."""
        ...


class PagemapDirty:
    """Asks the kernel what was written since the last reset; see `pagemap.written`."""

    exact = False
    """Pages that were written with what they had are among the ranges."""

    def __init__(self, memory: GuestMemory, descent: Descent) -> None:
        self._memory = memory
        self._descent = descent

    def ranges(self) -> list[Range]:
        """See DirtyPages."""
        return self._ranges(reset=False)

    def reset(self) -> None:
        """See DirtyPages."""
        pagemap.written(self._memory.pid, [_mapping(self._memory)], reset=True)

    def take(self) -> list[Range]:
        """See DirtyPages."""
        return self._ranges(reset=True)

    def _ranges(self, *, reset: bool) -> list[Range]:
        there, elsewhere = pagemap.written(self._memory.pid, [_mapping(self._memory)], reset=reset)
        if self._descent.parent is None:
            return list(_all_data(self._memory))
        if self._descent.demand_paged:
            elsewhere = list(data_within(self._memory.fd, elsewhere))
        return merge([*there, *elsewhere, *self._descent.removed])


class ContentDirty:
    """Compares all that is there with the parent, on any kernel: reads the whole VM and as much of the parent."""

    def __init__(self, memory: GuestMemory, descent: Descent) -> None:
        self._memory = memory
        self._descent = descent
        self.exact = descent.parent is not None

    def ranges(self) -> list[Range]:
        """See DirtyPages."""
        parent = self._descent.parent
        if parent is None:
            return list(_all_data(self._memory))
        return merge([*self._changed(parent), *self._zeroed(parent.header)])

    def reset(self) -> None:
        """See DirtyPages: nothing is remembered."""

    def take(self) -> list[Range]:
        """See DirtyPages; the vCPUs must stand all the same."""
        return self.ranges()

    def _changed(self, parent: Content) -> Iterator[Range]:
        comparison = Comparison()
        for offset, parts in spans(_all_data(self._memory)):
            length = parts[-1][1]
            read_exactly(self._memory.fd, comparison.new[:length], offset)
            parent.read_into(offset, comparison.old[:length])
            for kind, start, end in comparison.kinds(parts, known=True):
                if kind is not Kind.EQUAL:
                    yield offset + start, end - start

    def _zeroed(self, header: Header) -> Iterator[Range]:
        """Yield the holes that are zeros although the parent may have something there."""
        something = ((run.offset, run.length) for run in header.runs if run.build != NIL)
        zeros: Iterable[Range] = merge(self._descent.removed) if self._descent.demand_paged else something
        return holes_within(self._memory.fd, zeros)


def detect(memory: GuestMemory) -> type[PagemapDirty | ContentDirty]:
    """Return what works on this kernel, for memory registered as this one is. Raises ProcessGone, ScanFailed.

    That the memory was write-protected as a whole when it was registered is not seen from here. If it was not, the
    answers of PagemapDirty are right all the same, but have all that was fetched.
    """
    try:
        pagemap.written(memory.pid, [_mapping(memory)])
    except (ScanUnsupported, NotTracked):
        return ContentDirty
    return PagemapDirty


def _mapping(memory: GuestMemory) -> Mapping:
    return Mapping(memory.address, memory.size)


def _all_data(memory: GuestMemory) -> Iterator[Range]:
    return data_within(memory.fd, [(0, memory.size)])
