"""Archives in the `newc` format (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).

Pure and deterministic: equal entries give equal bytes, whatever machine, user or clock made them.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC = "070701"
TRAILER = "TRAILER!!!"
MAX_FIELD = 0xFFFF_FFFF  # eight hexadecimal digits; the kernel reads no longer sizes


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the archive, owned by root. `mode` carries the type; `device` is (major, minor) of a device node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, *, mode: int = 0o755) -> Entry:
    """A directory; the kernel makes no parents, so these come before what lies in them."""
    return Entry(name, stat.S_IFDIR | mode)


def regular(name: str, data: bytes, *, mode: int = 0o644) -> Entry:
    """A file with its content."""
    return Entry(name, stat.S_IFREG | mode, data)


def character_device(name: str, major: int, minor: int, *, mode: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive that holds `entries` in their order. ValueError: a name or a size that the format cannot carry."""
    out = bytearray()
    for inode, entry in enumerate(entries, start=1):
        _append(out, inode, entry)
    _append(out, 0, Entry(TRAILER, 0))
    return bytes(out)


def _append(out: bytearray, inode: int, entry: Entry) -> None:
    name = entry.name.encode() + b"\0"
    if entry.name.startswith("/") or b"\0" in name[:-1] or len(name) == 1:
        raise ValueError(f"not a name for an archive: {entry.name!r}")
    if len(entry.data) > MAX_FIELD:
        raise ValueError(f"{entry.name} is too large for an archive")
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    # inode, mode, uid, gid, links, mtime, size, device of the file system (2), device of the node (2), name, checksum
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, major, minor, len(name), 0)
    out += MAGIC.encode() + b"".join(b"%08X" % field for field in fields) + name
    _pad(out)
    out += entry.data
    _pad(out)


def _pad(out: bytearray) -> None:
    out += bytes(-len(out) % 4)
