"""Telling the pages of a memory that differ from its parent's, at the speed of memcmp.

Big pieces first: what is equal or zero as a whole costs one comparison; what differs everywhere costs one a page, which
ends at the first byte that differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import cffi

from agent.snapshots.header import PAGE

PIECE = 64 << 10
"""Bytes looked at together before their pages are."""

BUFFER_BYTES = 4 * PIECE
"""Of a memory and of its parent: together they fit a second-level cache."""

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

    def kinds(self, length: int, *, known: bool) -> Iterator[tuple[Kind, int, int]]:
        """Yield (kind, start, end) of the first `length` bytes, neighbours of a kind joined.

        `known`: whether `old` has the parent's pages; else nothing is EQUAL.
        """
        kind, start = Kind.EQUAL, 0
        for found, first in self._pieces(length, known=known):
            if found is not kind:
                if first > start:
                    yield kind, start, first
                kind, start = found, first
        if length > start:
            yield kind, start, length

    def _pieces(self, length: int, *, known: bool) -> Iterator[tuple[Kind, int]]:
        """Yield (kind, start) of pieces of any size, in order."""
        for start in range(0, length, PIECE):
            size = min(PIECE, length - start)
            kind = self._kind(start, size, known=known)
            # Pages of a changed piece may be zero or equal; those of a zero piece may be equal, if equals are known.
            if kind is Kind.EQUAL or (kind is Kind.ZERO and not known):
                yield kind, start
                continue
            for page in range(start, start + size, PAGE):
                yield self._kind(page, PAGE, known=known), page

    def _kind(self, start: int, length: int, *, known: bool) -> Kind:
        new = self._new + start
        if known and not _libc.memcmp(new, self._old + start, length):
            return Kind.EQUAL
        return Kind.CHANGED if _libc.memcmp(new, _ZEROS, length) else Kind.ZERO
