"""The runs of a header as arrays: 20 bytes a run instead of several objects."""

from __future__ import annotations

from array import array
from uuid import UUID

from agent.snapshots.errors import MemoryTooFragmented

NIL = UUID(int=0)

MAX_RUNS = 1 << 22
"""A memory of 16 GiB of which every other page differs; 160 MiB on disk."""


class Columns:
    """Run i begins at byte `starts[i]` of the memory and at byte `data[i]` of build `table[which[i]]`.

    A run ends where the next one begins. Grows at the end only; what continues the last run is made part of it.
    """

    __slots__ = ("_index", "data", "starts", "table", "which")

    def __init__(self) -> None:
        self.starts = array("Q")
        self.which = array("I")
        self.data = array("Q")
        self.table: list[UUID] = []
        self._index: dict[UUID, int] = {}

    def index(self, build: UUID) -> int:
        """Where a build stands in the table; it is added when it is new."""
        found = self._index.setdefault(build, len(self.table))
        if found == len(self.table):
            self.table.append(build)
        return found

    def append(self, start: int, which: int, data: int) -> None:
        """Add the run that begins at `start`, where the one before it ends. Raises MemoryTooFragmented."""
        if self.starts and self.which[-1] == which:
            follows = self.data[-1] + start - self.starts[-1]
            if data == follows or self.table[which] == NIL:
                return
        if len(self.starts) == MAX_RUNS:
            raise MemoryTooFragmented(f"the memory consists of more than {MAX_RUNS} runs")
        self.starts.append(start)
        self.which.append(which)
        self.data.append(data)
