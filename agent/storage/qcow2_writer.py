"""Writing an overlay's file from nothing, in one pass. Everything here blocks: call it from a thread.

Layout: header, first-level table, then data and second-level tables as they come, then the refcounts. Every cluster of
the file has exactly one reference, so the refcounts need no book-keeping. Format: see qcow2_header. For an empty
overlay this is three small writes; qemu-img needs a process and a dozen times as long, while a resume waits for it.
"""

from __future__ import annotations

import os
import sys
from array import array
from typing import TYPE_CHECKING

from agent.storage.qcow2_header import CLUSTER_BYTES, Header, encode, l1_entries

if TYPE_CHECKING:
    from collections.abc import Callable

COPIED = 1 << 63
"""Flag of an entry: what it points to has exactly one reference and may be written in place."""

COUNTS_PER_BLOCK = CLUSTER_BYTES // 2

COPY_BYTES = 8 << 20
"""Bytes copied between two looks at whether to go on."""

SYNC_BYTES = 64 << 20
"""Bytes between two syncs: a merge never owes the disk more, so neither its end nor another's fsync waits for long."""


class Writer:
    """Writes to an empty file. `may_go_on` is called between pieces of work and raises to end it."""

    def __init__(self, descriptor: int, disk_bytes: int, *, may_go_on: Callable[[], None] = lambda: None) -> None:
        self._descriptor = descriptor
        self._disk_bytes = disk_bytes
        self._may_go_on = may_go_on
        self._l1 = array("Q", bytes(8 * l1_entries(disk_bytes)))
        self._l1_offset = CLUSTER_BYTES
        self._end = self._l1_offset + _clusters(len(self._l1) * 8) * CLUSTER_BYTES
        self._unsynced = 0

    def copy(self, source: int, offset: int, length: int) -> int:
        """Append `length` bytes (whole clusters) of the file `source`, zeros where it ends. Returns their offset."""
        start, self._end = self._end, self._end + length
        done = 0
        while done < length:
            self._may_go_on()
            os.lseek(self._descriptor, start + done, os.SEEK_SET)
            copied = os.sendfile(self._descriptor, source, offset + done, min(length - done, COPY_BYTES))
            if copied == 0:
                break  # the last cluster of a file need not be there in full; the rest of it stays a hole here
            done += copied
            self._sync_some(copied)
        return start

    def add_table(self, index: int, entries: array[int]) -> None:
        """Append the second-level table number `index`."""
        self._may_go_on()
        self._l1[index] = self._end | COPIED
        _write(self._descriptor, self._end, _big_endian(entries))
        self._end += CLUSTER_BYTES
        self._sync_some(CLUSTER_BYTES)

    def finish(self, backing: tuple[str, str]) -> None:
        """Write tables and header. `backing`: name and format to record, see qcow2_header.encode."""
        if any(self._l1):
            _write(self._descriptor, self._l1_offset, _big_endian(self._l1))
        table_offset, table_clusters = self._write_refcounts()
        header = Header(self._disk_bytes, len(self._l1), self._l1_offset, table_offset, table_clusters)
        _write(self._descriptor, 0, encode(header, backing))
        os.ftruncate(self._descriptor, self._end)

    def _write_refcounts(self) -> tuple[int, int]:
        """Append refcount blocks and their table, which count themselves too. Returns the table's offset and size."""
        used = self._end // CLUSTER_BYTES
        total, blocks, table = 0, 0, 0
        while total != used + blocks + table:
            total = used + blocks + table
            blocks = -(-total // COUNTS_PER_BLOCK)
            table = _clusters(blocks * 8)
        offsets = array("Q", range(self._end, self._end + blocks * CLUSTER_BYTES, CLUSTER_BYTES))
        for number, offset in enumerate(offsets):
            _write(self._descriptor, offset, b"\0\1" * min(COUNTS_PER_BLOCK, total - number * COUNTS_PER_BLOCK))
        table_offset = self._end + blocks * CLUSTER_BYTES
        _write(self._descriptor, table_offset, _big_endian(offsets))
        self._end = table_offset + table * CLUSTER_BYTES
        return table_offset, table

    def _sync_some(self, written: int) -> None:
        self._unsynced += written
        if self._unsynced >= SYNC_BYTES:
            os.fdatasync(self._descriptor)
            self._unsynced = 0


def _clusters(length: int) -> int:
    return -(-length // CLUSTER_BYTES)


def _big_endian(entries: array[int]) -> bytes:
    swapped = array("Q", entries)
    if sys.byteorder == "little":
        swapped.byteswap()
    return swapped.tobytes()


def _write(descriptor: int, offset: int, data: bytes) -> None:
    """Write all of it: a nearly full disk takes a part first and refuses only the rest."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        offset, rest = offset + written, rest[written:]
