"""Reading a whole memory through its header."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from agent.snapshots.blocks import BuildReader
from agent.snapshots.header import NIL, Header

ZEROS = memoryview(bytes(1 << 16))


class MemoryReader:
    """The memory that `header` describes, from builds below `builds`. For any number of threads.

    The constructor opens every build, which may wait for the disk. Raises as BuildReader's does.
    """

    def __init__(self, header: Header, builds: Path) -> None:
        self.header = header
        self._readers: dict[UUID, BuildReader] = {}
        try:
            for build in header.builds():
                self._readers[build] = BuildReader(builds / str(build))
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, length: int) -> bytes:
        """A part of the memory. Raises DataDamaged, and ValueError outside the memory."""
        content = bytearray(length)
        self.read_into(offset, memoryview(content))
        return bytes(content)

    def read_into(self, offset: int, buffer: memoryview, *, wait: bool = True) -> None:
        """Fill `buffer` (bytes) with the memory from `offset` on; `wait`: as for BuildReader.read_into."""
        for run in self.header.slices(offset, len(buffer)):
            begin = run.offset - offset
            part = buffer[begin : begin + run.length]
            if run.build == NIL:
                _clear(part)
            else:
                self._readers[run.build].read_into(run.data_offset, part, wait=wait)

    def close(self) -> None:
        """Close the builds; harmless when done already."""
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _err: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()


def _clear(buffer: memoryview) -> None:
    for begin in range(0, len(buffer), len(ZEROS)):
        part = buffer[begin : begin + len(ZEROS)]
        part[:] = ZEROS[: len(part)]
