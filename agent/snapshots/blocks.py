"""A memory build: `<builds>/<uuid>/data`, pages one after the other, and `sums`, which tells whether they are whole."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from xxhash import xxh3_64, xxh3_64_intdigest

from agent.snapshots import files, sums
from agent.snapshots.errors import DataDamaged, WouldBlock
from agent.snapshots.header import PAGE
from agent.snapshots.sums import CHECKSUM_BLOCK

DATA = "data"
SUMS = "sums"

BUFFER_BYTES = 16 * CHECKSUM_BLOCK


class BuildWriter:
    """Writes one build, from the first byte to the last, into a new directory called by the build's id.

    Takes BUFFER_BYTES of memory and 8 bytes per CHECKSUM_BLOCK. Blocks on the disk: call it from a thread. Raises
    HostDiskFull and StoreFailed; whoever made the directory's parent removes what is then there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.build = UUID(directory.name)
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._written = 0
        self._sums = array("Q")
        self._finished = False
        self._descriptor = -1
        with files.reported(f"making {directory}"):
            files.make_directory(directory)
            self._descriptor = files.create(directory / DATA)

    @property
    def size(self) -> int:
        """Bytes appended so far."""
        return self._written + self._filled

    def append(self, data: memoryview | bytes) -> int:
        """Add whole pages; returns at which offset of the data they begin."""
        length = len(data)
        if length % PAGE:
            raise ValueError(f"{length} bytes are not whole pages")
        offset = self._written + self._filled
        end = self._filled + length
        if end <= BUFFER_BYTES:
            self._view[self._filled : end] = data
            self._filled = end
            return offset
        rest = memoryview(data)
        while rest:
            taken = min(len(rest), BUFFER_BYTES - self._filled)
            self._view[self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == BUFFER_BYTES:
                self._flush()
        return offset

    def finish(self) -> None:
        """Put everything on the disk; nothing can be appended afterwards. Harmless when done already."""
        if self._finished:
            return
        with files.reported(f"writing {self.directory}"):
            self._flush()
            files.seal(self._descriptor)
            self.close()
            self._descriptor = files.create(self.directory / SUMS)
            files.write_all(self._descriptor, memoryview(sums.encode(self._sums, self._written)))
            files.seal(self._descriptor)
            files.sync_directory(self.directory)
        self.close()
        self._finished = True

    def close(self) -> None:
        """Give the descriptor back, without finishing; harmless when done already."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _flush(self) -> None:
        for begin in range(0, self._filled, CHECKSUM_BLOCK):
            block = self._view[begin : min(begin + CHECKSUM_BLOCK, self._filled)]
            self._sums.append(xxh3_64_intdigest(block))
        with files.reported(f"writing {self.directory}"):
            files.write_all(self._descriptor, self._view[: self._filled])
        self._written += self._filled
        self._filled = 0


class BuildReader:
    """Reads a finished build. Every block is checked when it is first read. For any number of threads.

    The constructor reads the checksums, which may wait for the disk. Raises DataDamaged, naming the file, and if that
    could not be found out StoreFailed.
    """

    def __init__(self, directory: Path) -> None:
        self._name = str(directory / DATA)
        self._descriptor = -1
        try:
            self._descriptor = os.open(directory / DATA, os.O_RDONLY | os.O_CLOEXEC)
            self._size = os.fstat(self._descriptor).st_size
            self._sums = _read_sums(directory, self._size)
        except OSError as err:
            self.close()
            raise files.unreadable(err, "the data of a snapshot", DataDamaged) from err
        except DataDamaged:
            self.close()
            raise
        self._verified = bytearray(len(self._sums))
        self._spare: list[memoryview] = []

    @property
    def size(self) -> int:
        """Bytes of data."""
        return self._size

    def read_into(self, data_offset: int, buffer: memoryview, *, wait: bool = True) -> None:
        """Fill `buffer` (bytes) with the data from `data_offset` on.

        Raises DataDamaged; the buffer's content is then undefined. With `wait` false also WouldBlock, when not all
        that has to be read is in the page cache; nothing waits for the disk then.
        """
        length = len(buffer)
        end = data_offset + length
        if not 0 <= data_offset <= end <= self._size:
            raise DataDamaged(f"{self._name} has no bytes {data_offset} to {end}: it is {self._size} bytes long")
        if length == 0:
            return
        last = (end - 1) // CHECKSUM_BLOCK
        if self._verified.find(0, data_offset // CHECKSUM_BLOCK, last + 1) < 0:
            self._fill([buffer], data_offset, length, wait=wait)
        else:
            self._fill_verified(buffer, data_offset, end, wait=wait)

    def close(self) -> None:
        """Close the file; harmless when done already."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _err: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()

    def _fill_verified(self, buffer: memoryview, begin: int, end: int, *, wait: bool) -> None:
        """Read all of the blocks that `buffer` is a part of: checksums are of whole blocks."""
        first, last = begin // CHECKSUM_BLOCK, (end - 1) // CHECKSUM_BLOCK
        low = begin if self._verified[first] else first * CHECKSUM_BLOCK
        high = end if self._verified[last] else min((last + 1) * CHECKSUM_BLOCK, self._size)
        try:
            spare = self._spare.pop()
        except IndexError:
            spare = memoryview(bytearray(2 * CHECKSUM_BLOCK))
        head = spare[: begin - low]
        tail = spare[CHECKSUM_BLOCK : CHECKSUM_BLOCK + high - end]
        try:
            self._fill([head, buffer, tail], low, high - low, wait=wait)
            parts = ((low, head), (begin, buffer), (end, tail))
            for block in range(first, last + 1):
                if not self._verified[block]:
                    self._verify(block, parts)
        finally:
            self._spare.append(spare)

    def _verify(self, block: int, parts: tuple[tuple[int, memoryview], ...]) -> None:
        low = block * CHECKSUM_BLOCK
        high = low + CHECKSUM_BLOCK
        digest = xxh3_64()
        for begin, part in parts:
            piece = part[max(low - begin, 0) : max(high - begin, 0)]
            if piece:
                digest.update(piece)
        if digest.intdigest() != self._sums[block]:
            raise DataDamaged(f"{self._name} is damaged between bytes {low} and {min(high, self._size)}")
        self._verified[block] = 1

    def _fill(self, buffers: list[memoryview], offset: int, length: int, *, wait: bool) -> None:
        try:
            got = os.preadv(self._descriptor, buffers, offset, 0 if wait else os.RWF_NOWAIT)
        except OSError as err:
            if not wait:  # not in the page cache, or a file system that cannot tell
                raise WouldBlock from err
            raise DataDamaged(f"{self._name} cannot be read: {err}") from err
        if got == length:
            return
        if not wait:
            raise WouldBlock
        self._fill_rest(buffers, offset, got)

    def _fill_rest(self, buffers: list[memoryview], offset: int, skip: int) -> None:
        """Go on after a short read of `skip` bytes."""
        for buffer in buffers:
            while skip < len(buffer):
                try:
                    got = os.preadv(self._descriptor, [buffer[skip:]], offset + skip)
                except OSError as err:
                    raise DataDamaged(f"{self._name} cannot be read: {err}") from err
                if got == 0:
                    raise DataDamaged(f"{self._name} ends at byte {offset + skip}: it was {self._size} bytes long")
                skip += got
            offset += len(buffer)
            skip -= len(buffer)


def _read_sums(directory: Path, data_bytes: int) -> array[int]:
    name = directory / SUMS
    with name.open("rb") as file:
        # One byte more than there should be: enough to see that the file is too long.
        content = file.read(sums.encoded_size(data_bytes) + 1)
    decoded, size = sums.decode(content, name=str(name))
    if size != data_bytes:
        raise DataDamaged(f"{directory / DATA} is {data_bytes} bytes long instead of {size}")
    return decoded
