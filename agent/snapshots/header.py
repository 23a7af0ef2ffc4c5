"""`mem.header`: which bytes of which build make up a guest's memory.

The memory is cut into runs; each says where its content lies: in the data file of a build, or nowhere (the nil build:
zeros). Runs are sorted, cover the memory exactly, and neighbours that could be one run are one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import add, sub
from typing import NamedTuple, overload
from uuid import UUID

from agent.snapshots import header_format
from agent.snapshots.columns import NIL, Columns

PAGE = header_format.PAGE
COMPACT_AT = 8
"""Generations after which a snapshot's builds are worth being made one, unless the host's settings say otherwise."""

__all__ = ["COMPACT_AT", "NIL", "PAGE", "Header", "Run"]


class Run(NamedTuple):
    """`length` bytes of memory from `offset`: the bytes of `build` from `data_offset`, or zeros (NIL, data offset 0).

    Whole pages, except in what `Header.find` and `Header.slices` cut to measure.
    """

    offset: int
    length: int
    build: UUID
    data_offset: int


class Header:
    """The map of one memory; immutable. Made by `of`, `decode` or `merge.overlay`.

    `build` is the one that this generation wrote, `parent` the build of the generation before it (NIL: none).
    Generations count from 1, anew after a compaction.
    """

    __slots__ = ("build", "columns", "generation", "memory_bytes", "parent")

    def __init__(self, columns: Columns, fixed: header_format.Fixed) -> None:
        """For this package: takes what it is given, unchecked."""
        self.columns = columns
        self.memory_bytes = fixed.memory_bytes
        self.generation = fixed.generation
        self.build = fixed.build
        self.parent = fixed.parent

    @classmethod
    def of(cls, *, memory_bytes: int, generation: int, build: UUID, runs: Iterable[Run], parent: UUID = NIL) -> Header:
        """Make a header of sorted runs that cover the memory; neighbours are merged. Raises ValueError."""
        columns = Columns()
        position = 0
        for run in runs:
            check_run(run, position, memory_bytes)
            if run.offset != position:
                raise ValueError(f"no run covers the memory from {position} to {run.offset}")
            columns.append(run.offset, columns.index(run.build), run.data_offset)
            position += run.length
        if position != memory_bytes:
            raise ValueError(f"the runs cover {position} bytes of {memory_bytes}")
        fixed = header_format.Fixed(memory_bytes=memory_bytes, generation=generation, build=build, parent=parent)
        header_format.check_fixed(fixed)
        return cls(columns, fixed)

    @classmethod
    def decode(cls, data: bytes, *, name: str) -> Header:
        """Read what `encode` wrote. Raises HeaderDamaged, which names the file `name`; memory is bounded by `data`."""
        columns, fixed = header_format.decode(data, name=name)
        return cls(columns, fixed)

    def encode(self) -> bytes:
        """The header as a file's content; see header_format.py."""
        fixed = header_format.Fixed(
            memory_bytes=self.memory_bytes, generation=self.generation, build=self.build, parent=self.parent
        )
        return header_format.encode(self.columns, fixed)

    @property
    def runs(self) -> Sequence[Run]:
        """All runs, in order."""
        return _Runs(self)

    def find(self, offset: int) -> Run:
        """The rest of the run that byte `offset` of the memory lies in. Raises ValueError outside the memory."""
        if not 0 <= offset < self.memory_bytes:
            raise ValueError(f"offset {offset} lies outside a memory of {self.memory_bytes} bytes")
        index = bisect_right(self.columns.starts, offset) - 1
        return self.cut(index, offset, self.memory_bytes)

    def slices(self, offset: int, length: int) -> Iterator[Run]:
        """The runs of a part of the memory, cut to it. Raises ValueError when it does not lie in the memory."""
        end = offset + length
        if not 0 <= offset <= end <= self.memory_bytes:
            raise ValueError(f"{offset} to {end} lies outside a memory of {self.memory_bytes} bytes")
        if length == 0:
            return
        starts = self.columns.starts
        index = bisect_right(starts, offset) - 1
        while index < len(starts) and starts[index] < end:
            yield self.cut(index, offset, end)
            index += 1

    def builds(self) -> frozenset[UUID]:
        """The builds that the memory lies in."""
        return frozenset(self.columns.table) - {NIL}

    def extents(self) -> dict[UUID, int]:
        """How many bytes each build's data must have at least."""
        columns = self.columns
        lengths = map(sub, chain(columns.starts[1:], (self.memory_bytes,)), columns.starts)
        ends = [0] * len(columns.table)
        for which, end in zip(columns.which, map(add, columns.data, lengths), strict=True):
            ends[which] = max(ends[which], end)
        return {build: end for build, end in zip(columns.table, ends, strict=True) if build != NIL}

    def __eq__(self, other: object) -> bool:
        return self.encode() == other.encode() if isinstance(other, Header) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.memory_bytes, self.generation, self.build, self.parent, len(self.columns.starts)))

    def __repr__(self) -> str:
        return f"<Header generation={self.generation} build={self.build} runs={len(self.columns.starts)}>"

    def cut(self, index: int, low: int, high: int) -> Run:
        """For this package: run `index`, without what lies before byte `low` or from byte `high` on."""
        columns = self.columns
        starts = columns.starts
        begin = starts[index]
        end = starts[index + 1] if index + 1 < len(starts) else self.memory_bytes
        offset = max(begin, low)
        build = columns.table[columns.which[index]]
        data = 0 if build == NIL else columns.data[index] + offset - begin
        return Run(offset, min(end, high) - offset, build, data)


class _Runs(Sequence[Run]):
    """See Header.runs."""

    def __init__(self, header: Header) -> None:
        self._header = header

    def __len__(self) -> int:
        return len(self._header.columns.starts)

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Run]: ...
    def __getitem__(self, index: int | slice) -> Run | Sequence[Run]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return self._header.cut(range(len(self))[index], 0, self._header.memory_bytes)


def check_run(run: Run, position: int, memory_bytes: int) -> None:
    """Raise ValueError unless the run lies between `position` and the end of the memory, and can lie in a build."""
    offset, length, build, data_offset = run
    if (offset | length | data_offset) % PAGE:
        raise ValueError(f"{run} is not made of whole pages")
    if length <= 0 or offset < position or offset + length > memory_bytes:
        raise ValueError(f"{run} does not lie between {position} and {memory_bytes}")
    if data_offset < 0 or data_offset + length > header_format.MAX_BUILD_BYTES or (build == NIL and data_offset):
        raise ValueError(f"{run} has an impossible place in its build")
