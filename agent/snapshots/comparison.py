"""Telling the pages of a memory that differ from its parent's, at the speed of memcmp.

Big pieces first: what is equal or zero as a whole costs one comparison; what differs everywhere costs one a page, which
ends at the first byte that differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import cffi

from agent.snapshots.header import PAGE
from agent.snapshots.pagemap import Range

PIECE = 64 << 10
"""Bytes looked at together before their pages are."""

BUFFER_BYTES = 4 * PIECE
"""Of a memory and of its parent: together they fit a second-level cache."""

GAP = 4 * PAGE
"""Bytes between two ranges that are read rather than skipped: it takes less time than another call."""

_ffi = cffi.FFI()
_ffi.cdef("int memcmp(const void *, const void *, size_t);")
_libc: Any = _ffi.dlopen(None)
_ZEROS = _ffi.from_buffer(bytes(PIECE))


class Kind(Enum):
    """What a page is to a new generation."""

    EQUAL = "equal"
    """The parent's: nothing to note. Also a page of zeros where the parent has zeros."""
    ZERO = "zero"
    """Zeros, where the parent has something or is not known: to be noted; there is no data."""
    CHANGED = "changed"
    """To be written."""


class Comparison:
    """Two buffers of BUFFER_BYTES, `new` and `old`, to be filled, compared and filled again. For one thread."""

    def __init__(self) -> None:
        self.new = memoryview(bytearray(BUFFER_BYTES))
        self.old = memoryview(bytearray(BUFFER_BYTES))
        self._new = _ffi.from_buffer(self.new)
        self._old = _ffi.from_buffer(self.old)

    def kinds(self, parts: Iterable[tuple[int, int]], *, known: bool) -> Iterator[tuple[Kind, int, int]]:
        """Yield (kind, start, end) of the parts (start, end) of the buffers, neighbours of a kind joined.

        `known`: whether `old` has the parent's pages; else nothing is EQUAL.
        """
        kind, start, end = Kind.EQUAL, 0, 0
        for found, first, last in self._pieces(parts, known=known):
            if found is not kind or first != end:
                if end > start:
                    yield kind, start, end
                kind, start = found, first
            end = last
        if end > start:
            yield kind, start, end

    def _pieces(self, parts: Iterable[tuple[int, int]], *, known: bool) -> Iterator[tuple[Kind, int, int]]:
        """Yield (kind, start, end) of pieces of any size, in order."""
        for first, last in parts:
            for start in range(first, last, PIECE):
                end = min(start + PIECE, last)
                kind = self._kind(start, end - start, known=known)
                # Pages of a changed piece may be zero or equal; those of a zero piece may be equal, if that is known.
                if kind is Kind.EQUAL or (kind is Kind.ZERO and not known) or end - start == PAGE:
                    yield kind, start, end
                    continue
                for page in range(start, end, PAGE):
                    yield self._kind(page, PAGE, known=known), page, page + PAGE

    def _kind(self, start: int, length: int, *, known: bool) -> Kind:
        new = self._new + start
        if known and not _libc.memcmp(new, self._old + start, length):
            return Kind.EQUAL
        return Kind.CHANGED if _libc.memcmp(new, _ZEROS, length) else Kind.ZERO


def spans(ranges: Iterable[Range]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield (offset, parts) for ranges in order: what fits the buffers at once.

    A part is (start, end) from `offset` on. What is close together is one span, to be read with the gaps.
    """
    begin = end = 0
    parts: list[tuple[int, int]] = []
    for offset, length in ranges:
        start, stop = offset, offset + length
        while start < stop:
            if parts and (start - end > GAP or start - begin >= BUFFER_BYTES):
                yield begin, parts
                parts = []
            if not parts:
                begin = start
            end = min(stop, begin + BUFFER_BYTES)
            parts.append((start - begin, end - begin))
            start = end
    if parts:
        yield begin, parts
