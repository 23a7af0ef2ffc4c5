"""Reading a guest's memory file (a memfd) while a VM has it mapped.

Only pread, sendfile, SEEK_DATA and SEEK_HOLE, through a descriptor. Never map the memory of a living VM: reading a hole
through a mapping makes a zero page of it, and the VM's own fault, which its pager should have served, never comes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from typing import Protocol

from agent.snapshots.errors import SnapshotError
from agent.snapshots.pagemap import Range


class SourceUnreadable(SnapshotError):  # noqa: N818 - the name says what happened
    """A memory file is shorter than the memory, or gives an error: its VMM did that, or is gone."""


class GuestMemory(Protocol):
    """The memory of a VM whose process lives."""

    @property
    def pid(self) -> int:
        """The process that has the memory mapped."""
        ...

    @property
    def address(self) -> int:
        """Where it has it mapped, bytes."""
        ...

    @property
    def size(self) -> int:
        """Bytes, a multiple of the page size."""
        ...

    @property
    def fd(self) -> int:
        """The memory file, open for reading; its owner closes it. Its position is used."""
        ...


def data_within(descriptor: int, ranges: Iterable[Range]) -> Iterator[Range]:
    """Yield the parts of `ranges` (ascending, apart) that the file has pages for, swapped out ones too.

    Raises SourceUnreadable.
    """
    return ((offset, length) for offset, length, there in _extents(descriptor, ranges) if there)


def holes_within(descriptor: int, ranges: Iterable[Range]) -> Iterator[Range]:
    """Yield the other parts of `ranges`. Raises SourceUnreadable."""
    return ((offset, length) for offset, length, there in _extents(descriptor, ranges) if not there)


def read_exactly(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with what the file has at `offset`; holes are zeros and stay holes. Raises SourceUnreadable."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise SourceUnreadable(f"memory at {offset + done:#x}: {error.strerror}") from error
        if not count:
            raise SourceUnreadable(f"the memory file ends at {offset + done:#x}; its VMM has cut it")
        done += count


def _extents(descriptor: int, ranges: Iterable[Range]) -> Iterator[tuple[int, int, bool]]:
    """Cut `ranges` into (offset, length, whether it is data)."""
    start = stop = 0  # the data found last; to seek the end of data takes as long as it is, so it is done once
    for offset, length in ranges:
        position, end = offset, offset + length
        while position < end:
            if stop <= position:
                start, stop = _next_data(descriptor, position)
            there = start <= position
            following = min(end, stop if there else start)
            yield position, following - position, there
            position = following


def _next_data(descriptor: int, position: int) -> Range:
    """Return start and end of the first data at or after `position`; after the last, an empty piece out of reach."""
    try:
        start = os.lseek(descriptor, position, os.SEEK_DATA)
        return start, os.lseek(descriptor, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return _NOWHERE, _NOWHERE
        raise SourceUnreadable(f"memory at {position:#x}: {error.strerror}") from error


_NOWHERE = 1 << 63
