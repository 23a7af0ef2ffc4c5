"""The file behind a guest's memory (a memfd of the VMM's), opened through the mapping that the VMM has of it.

Pages can be put there without mapping them: the VM then finds them without a fault that reaches us, and its page table
goes on telling what it has touched. Only pread, pwrite and SEEK_DATA: mapping the memory of a living VM would put
zeros into its holes.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.snapshots.memory_file import data_within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.pager.regions import Region


@dataclass(frozen=True, slots=True)
class _Mapped:
    start: int
    end: int
    offset: int
    device: str


class GuestFile:
    """Owns the descriptor. `shift`: what to add to an offset in the guest's memory to get the one in the file."""

    def __init__(self, fd: int, shift: int) -> None:
        self._fd = fd
        self._shift = shift

    def close(self) -> None:
        """Close the file; harmless when done already. Frees all of the guest's memory if its VMM has ended: blocks."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def write(self, offset: int, data: memoryview) -> int:
        """Put content where no page is yet; how many bytes of it. Raises OSError."""
        return os.pwrite(self._fd, data, offset + self._shift)

    def present(self, regions: Sequence[Region]) -> list[tuple[int, int]]:
        """Which parts of the guest's memory have pages: (offset, length) in bytes. Blocks a little."""
        found: list[tuple[int, int]] = []
        for region in regions:
            parts = data_within(self._fd, [(region.offset + self._shift, region.size)])
            found.extend((offset - self._shift, length) for offset, length in parts)
        return found


def open_guest_file(pid: int, regions: Sequence[Region], *, uid: int) -> GuestFile | None:
    """Open the one shared memory file that all regions are mapped from; None if there is none, or it is not `uid`'s.

    A hostile VMM may map whatever file it can open for reading, and we write as root: so only a file of the kernel's
    own memory file system will do that the VMM's user made, which nobody else can have a hold of.
    """
    try:
        mappings = _mappings(pid)
        device = _memory_device()
        found: tuple[_Mapped, int] | None = None
        for region in regions:
            mapped = next((each for each in mappings if each.start <= region.address < each.end), None)
            if mapped is None or mapped.device != device or region.address + region.size > mapped.end:
                return None
            shift = mapped.offset + region.address - mapped.start - region.offset
            if found is not None and (mapped, shift) != found:
                return None
            found = (mapped, shift)
        return None if found is None else _open(pid, *found, uid=uid)
    except (OSError, ValueError):
        return None


def _open(pid: int, mapped: _Mapped, shift: int, *, uid: int) -> GuestFile | None:
    name = f"/proc/{pid}/map_files/{mapped.start:x}-{mapped.end:x}"
    fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    status = os.fstat(fd)
    if _name(status.st_dev) == _memory_device() and status.st_uid == uid and stat.S_ISREG(status.st_mode):
        return GuestFile(fd, shift)
    os.close(fd)
    return None


def _mappings(pid: int) -> list[_Mapped]:
    found: list[_Mapped] = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
        for line in lines:
            with suppress(ValueError):
                place, flags, offset, device, *_ = line.split(maxsplit=5)
                if flags.startswith("rw") and flags[3] == "s":
                    start, _, end = place.partition("-")
                    found.append(_Mapped(int(start, 16), int(end, 16), int(offset, 16), device))
    return found


def _memory_device() -> str:
    """The device number of the file system that memfds lie on, as /proc/PID/maps writes it."""
    global _device  # noqa: PLW0603 - found out once
    if _device is None:
        fd = os.memfd_create("device", os.MFD_CLOEXEC)
        _device = _name(os.fstat(fd).st_dev)
        os.close(fd)
    return _device


_device: str | None = None


def _name(device: int) -> str:
    return f"{os.major(device):02x}:{os.minor(device):02x}"
