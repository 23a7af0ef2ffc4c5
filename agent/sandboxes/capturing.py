"""The memory of a VM that stands still, on its way into a snapshot. Everything here blocks: call it in a thread."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING
from uuid import UUID

from agent.snapshots.capture import capture, grab
from agent.snapshots.dirty import ContentDirty, Descent, DirtyPages
from agent.snapshots.memory import MemoryReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record
    from agent.snapshots.blocks import BuildWriter
    from agent.snapshots.drafts import Draft
    from agent.vmm.driver import GuestMemory, Vm

Range = tuple[int, int]

GRABBED_IN_MEMORY = 256 << 20
"""Bytes of dirty pages that are copied to memory while the vCPUs stand; more than that go to the disk, which takes
several times as long for scattered pages."""


class CaptureStopped(Exception):  # noqa: N818 - says what happened
    """Nobody wants the snapshot any more."""


@dataclass(frozen=True)
class Grabbed:
    """A copy of parts of a memory, at the same offsets in `file`; whoever has it closes the file."""

    file: IO[bytes]
    ranges: list[Range]


@dataclass
class Source:
    """A VM's memory, the generation it is a difference to, and what tells the two apart."""

    memory: GuestMemory
    parent: MemoryReader | None
    dirty: DirtyPages

    def capture(self, draft: Draft, should_stop: Callable[[], bool]) -> None:
        """Write what differs from the parent into `draft`; the vCPUs stand."""
        self._write(draft, self.memory.fd, self.dirty.ranges(), should_stop)

    def grab(self, directory: Path) -> Grabbed:
        """Copy what may differ from the parent, and count anew from here; the vCPUs stand. `directory`: for a copy
        that is too large for the memory."""
        ranges = self.dirty.take()
        if sum(length for _, length in ranges) <= GRABBED_IN_MEMORY:
            file = os.fdopen(os.memfd_create("capsule-grabbed"), "w+b")
        else:
            file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - the caller's to close
        try:
            grab(self.memory, ranges, file.fileno())
        except BaseException:
            file.close()
            raise
        return Grabbed(file, ranges)

    def capture_grabbed(self, draft: Draft, grabbed: Grabbed, should_stop: Callable[[], bool]) -> None:
        """Write what `grab` copied into `draft`; the VM may run."""
        self._write(draft, grabbed.file.fileno(), grabbed.ranges, should_stop)

    def _write(self, draft: Draft, source: int, ranges: list[Range], should_stop: Callable[[], bool]) -> None:
        compared = None if self.dirty.exact else self.parent
        header = None if self.parent is None else self.parent.header
        writer = draft.new_build()
        result = capture(
            source,
            _until(should_stop, ranges),
            compared,
            header,
            _StoppableWriter(writer, should_stop),
            self.memory.size,
        )
        writer.finish()
        draft.write_header(result.header)


@contextmanager
def open_source(parts: HostParts, vm: Vm, record: Record) -> Iterator[Source]:
    """The memory of a VM and its parent; `record` as it was before anything of this snapshot was noted in it.

    Raises VmmError and SnapshotDamaged (the parent's).
    """
    memory = vm.memory()
    parent: MemoryReader | None = None
    try:
        if record.base:
            header = parts.snapshots.load(UUID(record.base)).header
            parent = MemoryReader(header, parts.snapshots.builds)
        kind = ContentDirty if record.untracked else parts.tracking(memory)
        yield Source(memory, parent, kind(memory, Descent(parent, demand_paged=bool(record.origin))))
    finally:
        if parent is not None:
            parent.close()
        os.close(memory.fd)


class _StoppableWriter:
    """A build's writer that gives up when nobody wants the build any more."""

    def __init__(self, writer: BuildWriter, should_stop: Callable[[], bool]) -> None:
        self.build = writer.build
        self._append = writer.append
        self._should_stop = should_stop

    def append(self, data: memoryview, /) -> int:
        """See BuildWriter."""
        if self._should_stop():
            raise CaptureStopped
        return self._append(data)


def _until(should_stop: Callable[[], bool], ranges: Iterable[Range]) -> Iterator[Range]:
    for one in ranges:
        if should_stop():
            raise CaptureStopped
        yield one
