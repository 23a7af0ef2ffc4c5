"""Opens what a VM's memory comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from agent.pager.service import SnapshotNotOpened, SnapshotUnreadable
from agent.snapshots.errors import DataDamaged, SnapshotDamaged, SnapshotError, StoreFailed
from agent.snapshots.files import ABSENT
from agent.snapshots.header import Header
from agent.snapshots.header_format import MAX_BYTES
from agent.snapshots.memory import MemoryReader

if TYPE_CHECKING:
    from agent.pager.service import PagedVm

HEADER = "mem.header"


class MemorySource(Protocol):
    """A snapshot's memory: what the pager needs of MemoryReader."""

    def read_into(self, offset: int, buffer: memoryview, *, wait: bool = True) -> None:
        """See MemoryReader.read_into."""
        ...

    def close(self) -> None:
        """Close what is open; harmless when done already."""
        ...


class OpenSnapshot:
    """`memory` becomes the receiver's, who closes it."""

    def __init__(self, memory: MemorySource, memory_bytes: int) -> None:
        self.memory = memory
        self.memory_bytes = memory_bytes


def open_snapshot(vm: PagedVm) -> OpenSnapshot:
    """Check the header and open its builds. Blocks on the disk.

    Raises SnapshotUnreadable for a file that is not there or not what was written, SnapshotNotOpened for what may pass;
    both name the file.
    """
    path = vm.snapshot / HEADER
    try:
        with path.open("rb") as file:
            header = Header.decode(file.read(MAX_BYTES + 1), name=str(path))
        return OpenSnapshot(MemoryReader(header, vm.builds), header.memory_bytes)
    except (OSError, SnapshotError) as err:
        kind = SnapshotUnreadable if _is_damage(err) else SnapshotNotOpened
        raise kind(f"the snapshot's memory cannot be served: {err}") from err


def _is_damage(err: OSError | SnapshotError) -> bool:
    return err.errno in ABSENT if isinstance(err, OSError) else isinstance(err, SnapshotDamaged)


class UnreadableMemory:
    """In place of a snapshot that cannot be opened while its VM runs: the VM may have all it needs of it already.

    `damaged`: it is the snapshot's fault.
    """

    def __init__(self, reason: str, *, damaged: bool) -> None:
        self._reason = reason
        self._error = DataDamaged if damaged else StoreFailed

    def read_into(self, _offset: int, _buffer: memoryview, *, wait: bool = True) -> None:  # noqa: ARG002 - the other's
        """Raise DataDamaged or StoreFailed."""
        raise self._error(self._reason)

    def close(self) -> None:
        """Nothing is open."""
