"""Where a running QEMU has its guest's memory, found in /proc: the file has no name anywhere else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agent.vmm.driver import GuestMemory, VmCommandFailed, VmGone

if TYPE_CHECKING:
    from collections.abc import Iterator

PROC = Path("/proc")

MEMORY_NAME = "/memfd:memory-backend-memfd (deleted)"
"""As /proc shows the file that QEMU makes for `-object memory-backend-memfd`."""

USERFAULTFD = "anon_inode:[userfaultfd]"


class Mapping(NamedTuple):
    start: int
    end: int
    offset: int
    inode: int


def find_memory(pid: int, size: int) -> GuestMemory:
    """Find the memory of `size` bytes of the QEMU `pid`; blocks. Raises VmGone, VmCommandFailed.

    The process may be hostile: what its /proc shows it has chosen itself, but for the kernel's own facts. So the file
    must be the one that is mapped, and of the right size.
    """
    try:
        mapping = _find_mapping(pid, size)
        descriptor = _open(pid, mapping, size)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise VmGone(f"process {pid} has gone") from error
    except OSError as error:
        raise VmCommandFailed(f"the memory of process {pid} cannot be opened: {error}") from error
    return GuestMemory(pid, mapping.start, size, descriptor)


def has_userfaultfd(pid: int) -> bool:
    """Tell whether a process has a userfaultfd open; one that has gone has none. Blocks."""
    try:
        return any(link == USERFAULTFD for _, link in _descriptors(pid))
    except (FileNotFoundError, ProcessLookupError):
        return False


def _find_mapping(pid: int, size: int) -> Mapping:
    """Return where the whole memory is mapped. The kernel may show one mapping in several pieces."""
    found: Mapping | None = None
    for piece in _mappings(pid):
        if found is not None and piece.start == found.end and piece.offset == found.offset + found.end - found.start:
            found = found._replace(end=piece.end)
        elif piece.offset == 0:
            found = piece
        if found is not None and found.end - found.start == size:
            return found
    raise VmCommandFailed(f"process {pid} has not mapped a guest memory of {size} bytes")


def _mappings(pid: int) -> Iterator[Mapping]:
    for line in (PROC / str(pid) / "maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == MEMORY_NAME and fields[1].startswith("rw-s"):
            start, end = (int(text, 16) for text in fields[0].split("-"))
            yield Mapping(start, end, int(fields[2], 16), int(fields[4]))


def _open(pid: int, mapping: Mapping, size: int) -> int:
    for entry, link in _descriptors(pid):
        if link != MEMORY_NAME:
            continue
        # It may be something else by now: nothing that opening could wait for, nothing but the file that is mapped.
        descriptor = os.open(entry, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_ino == mapping.inode and status.st_size >= size:
            return descriptor
        os.close(descriptor)
    raise VmCommandFailed(f"process {pid} has no descriptor of its guest's memory")


def _descriptors(pid: int) -> Iterator[tuple[Path, str]]:
    for entry in (PROC / str(pid) / "fd").iterdir():
        try:
            yield entry, str(entry.readlink())
        except FileNotFoundError:
            continue  # closed meanwhile
