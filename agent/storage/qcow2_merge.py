"""Several layers made one, cluster by cluster: what qemu-img has no command for. Blocks: call it from a thread.

`qemu-img convert -B` looks at the uppermost layer alone and silently gives the base's data for the rest; `commit`
finds files by the names recorded in others, and needs the layers for writing. Ours reads tables, never the base, and
copies in the kernel. Where several layers have a cluster the uppermost counts; one that it zeroed (a write of zeroes or
a discard above a backing file) is recorded as zero, so that the base's data stays hidden. Format: see qcow2_header.
"""

from __future__ import annotations

from array import array
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING

from agent.storage.overlay import OverlayDamaged
from agent.storage.qcow2_header import CLUSTER_BYTES, TABLE_ENTRIES, l1_entries
from agent.storage.qcow2_image import OFFSET_MASK, Image, opened
from agent.storage.qcow2_writer import COPIED, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

ZERO = 1
"""Flag of an entry: the cluster reads as zeros, whatever it points to and whatever is below."""

KNOWN_BITS = OFFSET_MASK | COPIED | ZERO
"""A compressed cluster (bit 62) is among what our VMMs never write."""


class Layer:
    """A layer that is read. Counts what it gives: no cluster of a file is in two places of a disk."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._tables = image.l1()
        self._clusters_left = image.file_bytes // CLUSTER_BYTES
        self.descriptor = image.descriptor

    def entries(self, index: int) -> Iterator[tuple[int, int]]:
        """Yield position and checked value, ZERO or an offset, of every entry in use of table number `index`."""
        if index >= len(self._tables) or not self._tables[index]:
            return
        for position, entry in enumerate(self._image.l2(self._tables[index])):
            if entry & ZERO:
                yield position, ZERO
            elif entry & ~COPIED:
                yield position, self._offset(entry)

    def _offset(self, entry: int) -> int:
        offset = entry & OFFSET_MASK
        if entry & ~KNOWN_BITS or offset % CLUSTER_BYTES or not 0 < offset < self._image.file_bytes:
            raise OverlayDamaged(f"{self._image.path} has a cluster at {entry:#x} that is none of ours")
        self._clusters_left -= 1
        if self._clusters_left < 0:
            raise OverlayDamaged(f"{self._image.path} has more clusters than there are in the file")
        return offset


def merge(
    base: tuple[Path, int], layers: Sequence[Path], descriptor: int, may_go_on: Callable[[], None] = lambda: None
) -> None:
    """Write the content of `layers`, bottom to top, into the empty file `descriptor`. `base`: its path and size.

    Takes memory for the first-level tables and two second-level ones. `may_go_on` is called at least every
    8 MiB and raises to end it. Raises OverlayMissing, OverlayBusy, OverlayDamaged, and OSError from writing.
    """
    with ExitStack() as stack:
        images = [stack.enter_context(opened(path)) for path in layers]
        for image in images:
            image.check_not_written()
            image.check_whole()
        _check_sizes(base[1], images)
        disk_bytes = images[-1].header.disk_bytes
        writer = Writer(descriptor, disk_bytes, may_go_on=may_go_on)
        sources = [Layer(image) for image in images]
        for index in range(l1_entries(disk_bytes)):
            _merge_table(index, sources, writer)
        writer.finish((str(base[0]), "raw"))


def _check_sizes(base_bytes: int, images: Sequence[Image]) -> None:
    """A layer larger than what is above it would show through beyond the end, where the chain reads zeros."""
    for below, above in pairwise(images):
        if below.header.disk_bytes > above.header.disk_bytes:
            raise OverlayDamaged(f"{above.path} is a smaller disk than its layer {below.path}")
    if images[0].header.disk_bytes < base_bytes:
        raise OverlayDamaged(f"{images[0].path} is a smaller disk than its base image")


def _merge_table(index: int, sources: Sequence[Layer], writer: Writer) -> None:
    merged: dict[int, tuple[int, int]] = {}  # position -> its file and its offset there, or ZERO
    for source in sources:
        for position, value in source.entries(index):
            merged[position] = (source.descriptor, value)
    if not merged:
        return
    table = array("Q", bytes(CLUSTER_BYTES))
    for position, count, descriptor, value in _runs(merged):
        if value == ZERO:
            table[position] = ZERO
            continue
        offset = writer.copy(descriptor, value, count * CLUSTER_BYTES)
        for number in range(count):
            table[position + number] = (offset + number * CLUSTER_BYTES) | COPIED
    writer.add_table(index, table)


def _runs(merged: dict[int, tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """Yield position, count, file and offset of clusters that follow each other on the disk and in one file."""
    start, count, file, offset = 0, 0, -1, 0
    for position in range(TABLE_ENTRIES):
        descriptor, value = merged.get(position, (-1, 0))
        if count and descriptor == file and value == offset + count * CLUSTER_BYTES:
            count += 1
            continue
        if count:
            yield start, count, file, offset
        start, count, file, offset = position, int(value != 0), descriptor, value
    if count:
        yield start, count, file, offset
