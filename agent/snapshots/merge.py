"""Putting the pages of one generation over the memory of the one before it."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from agent.snapshots import header_format
from agent.snapshots.columns import NIL, Columns
from agent.snapshots.header import Header, Run, check_run


def overlay(parent: Header | None, changed: Iterable[Run], *, memory_bytes: int, build: UUID) -> Header:
    """The memory of `parent` (None: all zeros) with sorted `changed` runs put over it: the next generation.

    One pass over both. `build`: what this generation wrote. Raises ValueError, MemoryTooFragmented.
    """
    if parent is not None and parent.memory_bytes != memory_bytes:
        raise ValueError(f"a memory of {parent.memory_bytes} bytes cannot become one of {memory_bytes}")
    columns = Columns()
    below = _Below(parent, columns)
    position = 0
    for run in changed:
        check_run(run, position, memory_bytes)
        below.copy(position, run.offset)
        columns.append(run.offset, columns.index(run.build), run.data_offset)
        position = run.offset + run.length
    below.copy(position, memory_bytes)
    fixed = header_format.Fixed(
        memory_bytes=memory_bytes,
        generation=1 if parent is None else parent.generation + 1,
        build=build,
        parent=NIL if parent is None else parent.build,
    )
    header_format.check_fixed(fixed)
    return Header(columns, fixed)


class _Below:
    """Copies parts of a parent into `columns`, from the lowest to the highest, in one pass over its runs."""

    def __init__(self, parent: Header | None, columns: Columns) -> None:
        self._from = _zeros() if parent is None else parent.columns
        self._to = columns
        self._next = 0

    def copy(self, begin: int, end: int) -> None:
        """Copy what the parent has from byte `begin` to byte `end`."""
        if begin == end:
            return
        source, target, index = self._from, self._to, self._next
        starts = source.starts
        while index + 1 < len(starts) and starts[index + 1] <= begin:
            index += 1
        while index < len(starts) and starts[index] < end:
            start = max(starts[index], begin)
            build = source.table[source.which[index]]
            data = 0 if build == NIL else source.data[index] + start - starts[index]
            target.append(start, target.index(build), data)
            index += 1
        self._next = index - 1


def _zeros() -> Columns:
    columns = Columns()
    columns.append(0, columns.index(NIL), 0)
    return columns
