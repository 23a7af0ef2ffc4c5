"""What a VMM's memory looks like when its serving begins: what is there already, and what it has given back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from agent.pager.abi import PAGE
from agent.pager.faults import ABSENT, PRESENT, REMOVED, PageMap
from agent.pager.guest_file import GuestFile, open_guest_file
from agent.snapshots.pagemap import Mapping, TrackingError, written

if TYPE_CHECKING:
    from agent.pager.handshake import Client
    from agent.pager.records import Served


class MemoryLook(NamedTuple):
    """`tracked`: see Served. `file` is the receiver's to close."""

    pages: PageMap
    file: GuestFile | None
    tracked: bool


def look_at_memory(client: Client, uid: int, memory_bytes: int, served: Served | None) -> MemoryLook:
    """Look; `served`: what an earlier pager noted. Blocks a millisecond or so.

    Without a memory file nothing is known to be there; what is shows when it is to be brought again (EEXIST).
    """
    pages = PageMap(memory_bytes)
    file = open_guest_file(client.identity.pid, client.regions, uid=uid)
    if file is not None:
        pages.mark_bytes(file.present(client.regions), PRESENT)
    written_and_absent = _written_and_absent(client)
    if served is None:
        return MemoryLook(pages, file, tracked=written_and_absent == [])
    if served.tracked and file is not None:
        for offset, length in written_and_absent or []:
            for run in list(pages.runs(ABSENT, offset // PAGE, (offset + length) // PAGE)):
                pages.mark(*run, REMOVED)
    return MemoryLook(pages, file, served.tracked)


def _written_and_absent(client: Client) -> list[tuple[int, int]] | None:
    """What counts as written and is not mapped, (offset, length); None if the kernel does not track it."""
    mappings = [Mapping(region.address, region.size, region.offset) for region in client.regions]
    try:
        return written(client.identity.pid, mappings)[1]
    except TrackingError:
        return None
