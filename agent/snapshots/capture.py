"""Taking a generation of a VM's memory: what changed goes to a build, everything else stays where it is.

It needs a megabyte of memory and the arrays of two headers, whatever the size of the guest.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from agent.snapshots import files
from agent.snapshots.comparison import Comparison, Kind, spans
from agent.snapshots.errors import WouldBlock
from agent.snapshots.header import NIL, PAGE, Header, Run
from agent.snapshots.memory_file import GuestMemory, SourceUnreadable, read_exactly
from agent.snapshots.merge import overlay
from agent.snapshots.pagemap import Range

SLOW_PARENT = 200_000_000
"""Bytes a second. Reading a parent that is no longer in the page cache at this speed costs what it saves in writing."""

PATIENCE = 0.1
"""Seconds of waiting for a parent before its speed is judged."""


class Content(Protocol):
    """The content of a whole memory; `memory.MemoryReader`."""

    def read_into(self, offset: int, buffer: memoryview, *, wait: bool = True) -> None:
        """Fill `buffer` with the memory from `offset` on; without `wait` raise WouldBlock if that needs the disk."""
        ...


class Writer(Protocol):
    """Takes the data of a build; `blocks.BuildWriter`."""

    @property
    def build(self) -> UUID:
        """The build's id."""
        ...

    def append(self, data: memoryview, /) -> int:
        """Write `data` behind what is there and return at which offset it begins."""
        ...


@dataclass(frozen=True, slots=True)
class CaptureResult:
    """A new generation, and what was found on the way."""

    header: Header
    pages_written: int
    pages_equal: int
    """Dropped: they are the parent's."""
    pages_zero: int
    """Zero pages that the header notes; they take no data."""


def capture(
    source: int,
    ranges: Iterable[Range],
    parent: Content | None,
    parent_header: Header | None,
    writer: Writer,
    memory_bytes: int,
) -> CaptureResult:
    """Write what differs from the parent to `writer` and return the header of the new generation.

    `source` is the memory file of a VM whose vCPUs stand, or what `grab` copied of it. `ranges`, ascending and apart,
    are all pages that may differ; holes there are zeros. Every page is read once, so a VMM that goes on writing harms
    only its own snapshot. Without `parent_header` the parent is all zeros. With it but without `parent`, nothing is
    compared: the ranges are known to differ (`DirtyPages.exact`). What can be compared only by waiting for a slow disk
    is taken for changed: such a generation is bigger, not wrong.

    The caller finishes the writer. Blocks; for a thread. Raises SourceUnreadable, DataDamaged (the parent's),
    MemoryTooFragmented and what the writer raises; the writer's build is of no use then.
    """
    found: Counter[Kind] = Counter()
    comparison = Comparison()
    old = None if parent is None or parent_header is None else _Parent(parent)

    def changes() -> Iterator[Run]:
        for offset, parts in spans(_checked(ranges, memory_bytes)):
            length = parts[-1][1]
            read_exactly(source, comparison.new[:length], offset)
            known = old is not None and old.read(offset, comparison.old[:length])
            for kind, start, end in comparison.kinds(parts, known=known):
                found[kind] += (end - start) // PAGE
                if kind is Kind.CHANGED:
                    yield Run(offset + start, end - start, writer.build, writer.append(comparison.new[start:end]))
                elif kind is Kind.ZERO:
                    yield Run(offset + start, end - start, NIL, 0)

    header = overlay(parent_header, changes(), memory_bytes=memory_bytes, build=writer.build)
    return CaptureResult(header, found[Kind.CHANGED], found[Kind.EQUAL], found[Kind.ZERO])


def grab(memory: GuestMemory, ranges: Iterable[Range], into: int) -> None:
    """Copy `ranges` of the memory to the same places of the empty file `into`: its `capture` can wait, the VM need not.

    The VM's vCPUs stand. The file gets the memory's size, and holes wherever nothing was copied. Blocks; for a thread.
    Raises SourceUnreadable, HostDiskFull, StoreFailed.
    """
    with files.reported("copying memory"):
        os.ftruncate(into, memory.size)
        for offset, length in ranges:
            os.lseek(into, offset, os.SEEK_SET)
            done = 0
            while done < length:
                count = os.sendfile(into, memory.fd, offset + done, length - done)
                if not count:
                    raise SourceUnreadable(f"the memory file ends at {offset + done:#x}; its VMM has cut it")
                done += count


class _Parent:
    """The parent's pages: at once if the page cache has them, else as long as the disk is quick."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._allowed = PATIENCE

    def read(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer`; False if that would cost too much."""
        try:
            self._content.read_into(offset, buffer, wait=False)
        except WouldBlock:
            if self._allowed <= 0:
                return False
            begin = time.perf_counter()
            self._content.read_into(offset, buffer)
            self._allowed += len(buffer) / SLOW_PARENT - (time.perf_counter() - begin)
        return True


def _checked(ranges: Iterable[Range], memory_bytes: int) -> Iterator[Range]:
    """Yield the ranges. Raises ValueError for what are no ranges of this memory, or not in order."""
    end = 0
    for offset, length in ranges:
        if offset < end or length <= 0 or offset % PAGE or length % PAGE or offset + length > memory_bytes:
            raise ValueError(f"no range of a memory of {memory_bytes} bytes after {end}: {offset}, {length}")
        end = offset + length
        yield offset, length
