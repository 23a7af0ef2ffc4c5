"""What the kernel knows about the pages of another process: which are mapped, which were written.

Two interfaces of /proc/PID/pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst; structures in
include/uapi/linux/fs.h): the PAGEMAP_SCAN ioctl (6.7 and later), and the file itself, eight bytes for each page.

"Written" needs memory that is registered with userfaultfd for asynchronous write protection and was write-protected
as a whole once, right after that. Without the latter, pages that were never there count as written.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PAGE = 4096

PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_PRESENT = 1 << 3
PM_SCAN_WP_MATCHING = 1 << 0
"""Write-protect what is reported, in the same step: no write falls between the two."""
PM_SCAN_CHECK_WPASYNC = 1 << 1
"""Fail (EPERM) when any of the memory is not registered for asynchronous write protection."""

_PAGEMAP_SCAN = 0xC0606610
"""_IOWR('f', 16, struct pm_scan_arg)."""
_ARGUMENT = struct.Struct("<12Q")
"""struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
category_anyof_mask, return_mask."""
_WALK_END = 4 * 8
_REGION = 3
"""struct page_region: start, end, categories; 64 bits each."""

REGIONS_AT_ONCE = 4096
"""Regions in one answer of the kernel: 96 KiB. Memory in more pieces takes more calls."""

_ENTRY = 8
_ENTRIES_AT_ONCE = 1 << 16
_TOP_BYTES = bytes(value >> 7 for value in range(256))
"""Bit 63 of an entry is "present": of its top byte (the last, little-endian) this makes 0 or 1."""

Range = tuple[int, int]
"""Offset in the memory file and length, both in bytes and multiples of PAGE."""


class TrackingError(Exception):
    """Base of what goes wrong when pages are asked for; never raised itself."""


class ScanUnsupported(TrackingError):  # noqa: N818 - the names say what happened
    """The kernel has no PAGEMAP_SCAN (Linux 6.7)."""


class NotTracked(TrackingError):  # noqa: N818
    """The memory is not registered for asynchronous write protection."""


class ProcessGone(TrackingError):  # noqa: N818
    """The process has ended, or is ending."""


class ScanFailed(TrackingError):  # noqa: N818
    """The kernel refused for another reason; the message has its error."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """A piece of the memory file as a process has it mapped; bytes, multiples of PAGE."""

    address: int
    length: int
    offset: int = 0
    """Of the piece in the memory file."""


def written(pid: int, mappings: Iterable[Mapping], *, reset: bool = False) -> tuple[list[Range], list[Range]]:
    """Return what the process (or the kernel for it) has written since the last reset: mapped pages, and the others.

    The memory file has every mapped page. Of the others it must be asked: they are swapped out, were removed, or, in
    memory that was never write-protected as a whole, were never there.
    With `reset` the same call makes the pages count as not written, each at the moment it is looked at.
    Raises ScanUnsupported, NotTracked, ProcessGone, ScanFailed.
    """
    flags = PM_SCAN_CHECK_WPASYNC | (PM_SCAN_WP_MATCHING if reset else 0)
    found: tuple[list[Range], list[Range]] = ([], [])
    with _pagemap(pid) as pagemap:
        for mapping in mappings:
            for offset, length, categories in _scan(pagemap, mapping, PAGE_IS_WRITTEN, PAGE_IS_PRESENT, flags):
                found[0 if categories & PAGE_IS_PRESENT else 1].append((offset, length))
    return merge(found[0]), merge(found[1])


def mapped(pid: int, mappings: Iterable[Mapping]) -> list[Range]:
    """Return the pages that are in the process's page tables; on any kernel.

    Less than what is in the memory file: a page that others put there is not mapped before it is touched.
    Raises ProcessGone, ScanFailed.
    """
    mappings = list(mappings)
    try:
        with _pagemap(pid) as pagemap:
            regions = [region for mapping in mappings for region in _scan(pagemap, mapping, PAGE_IS_PRESENT, 0, 0)]
    except ScanUnsupported:
        return mapped_by_entries(pid, mappings)
    return merge((offset, length) for offset, length, _ in regions)


def mapped_by_entries(pid: int, mappings: Iterable[Mapping]) -> list[Range]:
    """`mapped`, read from the entries of the single pages: for kernels without PAGEMAP_SCAN."""
    with _pagemap(pid) as pagemap:
        return merge(part for mapping in mappings for part in _present(pagemap, mapping))


def merge(ranges: Iterable[Range]) -> list[Range]:
    """Return the same pages in ascending order, each once, neighbours joined."""
    merged: list[Range] = []
    start = end = 0
    for offset, length in sorted(ranges):
        if offset > end:
            if end > start:
                merged.append((start, end - start))
            start, end = offset, offset
        end = max(end, offset + length)
    if end > start:
        merged.append((start, end - start))
    return merged


@contextlib.contextmanager
def _pagemap(pid: int) -> Iterator[int]:
    """Open the process's pagemap; what goes wrong meanwhile gets its type."""
    try:
        descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _failure(pid, error) from error


def _failure(pid: int, error: OSError) -> TrackingError:
    if error.errno == errno.ENOTTY:
        return ScanUnsupported("the kernel has no PAGEMAP_SCAN; Linux 6.7 or later has it")
    if error.errno in {errno.ENOENT, errno.ESRCH}:
        return ProcessGone(f"process {pid} is gone")
    if error.errno == errno.EPERM:
        return NotTracked(f"memory of process {pid} is not registered for asynchronous write protection")
    return ScanFailed(f"/proc/{pid}/pagemap: {error.strerror}")


def _scan(pagemap: int, mapping: Mapping, category: int, told: int, flags: int) -> Iterator[tuple[int, int, int]]:
    """Yield (offset, length, categories) of pages in `category`; of the categories, those in `told` are meaningful.

    As many calls as the regions need: the kernel says how far it came.
    """
    regions = array.array("Q", bytes(8 * _REGION * REGIONS_AT_ONCE))
    vector = (regions.buffer_info()[0], REGIONS_AT_ONCE)
    start, end = mapping.address, mapping.address + mapping.length
    shift = mapping.offset - mapping.address
    while start < end:
        argument = bytearray(
            _ARGUMENT.pack(_ARGUMENT.size, flags, start, end, 0, *vector, 0, 0, category, 0, category | told)
        )
        count = _REGION * fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        for first in range(0, count, _REGION):
            yield regions[first] + shift, regions[first + 1] - regions[first], regions[first + 2]
        (reached,) = struct.unpack_from("<Q", argument, _WALK_END)
        if reached <= start:
            raise ScanFailed(f"PAGEMAP_SCAN came no further than {start:#x}")
        start = reached


def _present(pagemap: int, mapping: Mapping) -> Iterator[Range]:
    for first in range(0, mapping.length // PAGE, _ENTRIES_AT_ONCE):
        wanted = min(_ENTRIES_AT_ONCE, mapping.length // PAGE - first) * _ENTRY
        entries = os.pread(pagemap, wanted, (mapping.address // PAGE + first) * _ENTRY)
        if not entries:
            raise ProcessLookupError(errno.ESRCH, "no memory is left")
        if len(entries) < wanted:
            raise OSError(errno.EIO, f"{len(entries)} of {wanted} bytes")
        present = entries[_ENTRY - 1 :: _ENTRY].translate(_TOP_BYTES)
        start = present.find(1)
        while start >= 0:
            end = present.find(0, start)
            end = len(present) if end < 0 else end
            yield mapping.offset + (first + start) * PAGE, (end - start) * PAGE
            start = present.find(1, end)
