"""Reading an overlay's file from outside, while a VMM may have it open. Everything here blocks: call it from a thread.

No lock is taken and nothing is opened that the file names. Format: see qcow2_header.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import sys
from array import array
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.storage import files
from agent.storage.overlay import OverlayBusy, OverlayDamaged, OverlayMissing
from agent.storage.qcow2_header import CLUSTER_BYTES, Header, decode, l1_entries

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
"""The part of a table's entry that is an offset in the file."""

COUNTED_BYTES = CLUSTER_BYTES // 2 * CLUSTER_BYTES
"""Bytes of the file whose clusters one block of reference counts covers."""

WRITE_LOCK = 101
"""Byte of the file that QEMU locks while it may write to the image (block/file-posix.c: permission byte 100 + 1)."""

FLOCK = struct.Struct("hhqqi4x")
"""struct flock of fcntl(2)."""


@dataclass(frozen=True, slots=True)
class Image:
    """An open qcow2 file whose header was found to be one of ours."""

    path: Path
    descriptor: int
    file_bytes: int
    header: Header

    def l1(self) -> array[int]:
        """Return the offsets of the second-level tables that the disk needs, 0 where there is none."""
        entries = self._entries(self.header.l1_offset, l1_entries(self.header.disk_bytes) * 8)
        return array("Q", (self._place(entry & OFFSET_MASK) if entry else 0 for entry in entries))

    def l2(self, offset: int) -> array[int]:
        """Return the entries, as they are, of the second-level table at `offset` (of `l1`, not 0)."""
        return self._entries(offset, CLUSTER_BYTES)

    def check_whole(self) -> None:
        """Check that nothing is cut off: every table is in the file, and so is the last cluster in use.

        Takes two reads and one per 2 GiB of file. Raises OverlayDamaged.
        """
        self.l1()
        if self._last_cluster() * CLUSTER_BYTES >= self.file_bytes:
            raise OverlayDamaged(f"{self.path} is cut off: it ends at {self.file_bytes} bytes, amid its clusters")

    def check_not_written(self) -> None:
        """Raises OverlayBusy if a VMM may write to it."""
        query = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, WRITE_LOCK, 1, 0)
        kind, *_ = FLOCK.unpack(fcntl.fcntl(self.descriptor, fcntl.F_OFD_GETLK, query))
        if kind != fcntl.F_UNLCK:
            raise OverlayBusy(f"a VM has {self.path} open for writing")

    def _last_cluster(self) -> int:
        """Return the number of the highest cluster that has references: counted in blocks of 16-bit integers.

        A hostile VMM can write a table of a million entries, so none is followed that counts what lies beyond the file.
        """
        header = self.header
        table = self._entries(header.refcount_table_offset, header.refcount_table_clusters * CLUSTER_BYTES)
        blocks = self.file_bytes // COUNTED_BYTES + 2  # one more than needed: of a write that found the disk full
        if any(table[blocks:]):
            raise OverlayDamaged(f"{self.path} is cut off: it counts clusters beyond its {self.file_bytes} bytes")
        for number in range(min(blocks, len(table)) - 1, -1, -1):
            if table[number]:
                counts = self._read(self._place(table[number] & OFFSET_MASK), CLUSTER_BYTES).rstrip(b"\0")
                if counts:
                    return number * (CLUSTER_BYTES // 2) + (len(counts) - 1) // 2
        raise OverlayDamaged(f"{self.path} is not an overlay of ours: no cluster is in use")

    def _place(self, offset: int) -> int:
        """Check the place of a whole cluster in the file."""
        if offset % CLUSTER_BYTES or not CLUSTER_BYTES <= offset <= self.file_bytes - CLUSTER_BYTES:
            raise OverlayDamaged(f"{self.path} has a table at {offset:#x}, in a file of {self.file_bytes} bytes")
        return offset

    def _entries(self, offset: int, length: int) -> array[int]:
        entries = array("Q", self._read(offset, length))
        if sys.byteorder == "little":
            entries.byteswap()
        return entries

    def _read(self, offset: int, length: int) -> bytes:
        data = os.pread(self.descriptor, length, offset)
        if len(data) != length:
            raise OverlayDamaged(f"{self.path} is cut off: {length} bytes at {offset:#x} are not all there")
        return data


@contextmanager
def opened(path: Path) -> Iterator[Image]:
    """Open a file and read its header. Raises OverlayMissing, OverlayDamaged, StorageToolFailed."""
    descriptor = _open(path)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OverlayDamaged(f"{path} is not a regular file")
        header = decode(os.pread(descriptor, CLUSTER_BYTES, 0), status.st_size, name=str(path))
        yield Image(path, descriptor, status.st_size, header)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open without following a link or waiting for the other end of a pipe: a hostile VMM may have put either there."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise OverlayMissing(f"there is no overlay {path}") from error
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise OverlayDamaged(f"{path} is not a regular file") from error
        raise files.failure(error) from error
