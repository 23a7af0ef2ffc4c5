"""Which pages a VM touches in the beginning of a run: what its next resume brings in at once.

With a memory file the page table knows it to the page: what was put into the file is mapped by the VM's own touch.
Without one, what faulted and what had been brought ahead must do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from agent.snapshots import working_set
from agent.snapshots.errors import SnapshotError
from agent.snapshots.pagemap import Mapping, TrackingError, mapped, merge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agent.pager.regions import Region
    from agent.snapshots.pagemap import Range

log = structlog.get_logger()

RECORDED_FAULTS = 1024
"""Faults after which what was touched is no start of a guest any more, but its work: 64 MiB at the most."""

MAX_PREFETCH_BYTES = 64 << 20
"""Brought in before a VM runs, at most: a guest decides what it touches, and other resumes wait for its working set."""

WORKING_SET = "working-set"


class Recorder:
    """Records until `finish`, or until so many faults that it must do."""

    def __init__(self, pid: int, regions: Sequence[Region], *, by_page_table: bool) -> None:
        self.active = True
        self.taken = False
        """Somebody has asked for the result already."""
        self.by_page_table = by_page_table
        self._pid = pid
        self._mappings = [Mapping(region.address, region.size, region.offset) for region in regions]
        self._noted: list[Range] = []
        self._touched: list[Range] | None = None

    def note(self, ranges: Sequence[Range]) -> None:
        """These parts were touched, (offset, length) in bytes; not needed `by_page_table`."""
        if self.active and not self.by_page_table:
            self._noted.extend(ranges)

    async def finish(self) -> list[Range] | None:
        """Stop recording; what was touched, None if that cannot be known."""
        if self.active and self.by_page_table and self._touched is None:
            try:
                self._touched = await trio.to_thread.run_sync(mapped, self._pid, self._mappings)
            except TrackingError as err:
                log.warning("working_set_unknown", error=str(err))
        elif self.active:
            self._touched = merge(self._noted)
        self.active = False
        return self._touched

    def drop(self) -> None:
        """Stop recording and know nothing."""
        self.active = False


def read_working_set(snapshot: Path) -> tuple[Range, ...]:
    """The parts that a resume of this snapshot is likely to touch, none if nothing is known.

    At most MAX_PREFETCH_BYTES. Blocks on the disk.
    """
    known = working_set.read(snapshot / WORKING_SET)
    return () if known is None else tuple(_first(known.ranges(), MAX_PREFETCH_BYTES))


def _first(ranges: Sequence[Range], most: int) -> Iterator[Range]:
    for offset, length in ranges:
        if most > 0:
            yield offset, min(length, most)
        most -= length


def write_working_set(snapshot: Path, touched: Sequence[Range]) -> None:
    """Combine a run with the earlier ones. Blocks on the disk. Failing costs the next resume some time: logged."""
    path = snapshot / WORKING_SET
    try:
        working_set.write(path, working_set.combine(working_set.read(path), touched))
    except (OSError, SnapshotError) as err:
        log.warning("working_set_not_written", path=str(path), error=str(err))
