"""Opens what a VM's memory comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.pager.service import SnapshotUnreadable
from agent.snapshots.errors import SnapshotError
from agent.snapshots.header import Header
from agent.snapshots.header_format import MAX_BYTES
from agent.snapshots.memory import MemoryReader

if TYPE_CHECKING:
    from agent.pager.service import PagedVm

HEADER = "mem.header"


def open_snapshot(vm: PagedVm) -> MemoryReader:
    """Check the header and open its builds. Raises SnapshotUnreadable, naming the file. Blocks on the disk."""
    path = vm.snapshot / HEADER
    try:
        with path.open("rb") as file:
            header = Header.decode(file.read(MAX_BYTES + 1), name=str(path))
        return MemoryReader(header, vm.builds)
    except (OSError, SnapshotError) as err:
        raise SnapshotUnreadable(f"the snapshot's memory cannot be served: {err}") from err
