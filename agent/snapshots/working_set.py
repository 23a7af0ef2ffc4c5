"""`working-set`: the pages that the last resumes of a snapshot touched. Advice: a damaged one counts as none.

Little-endian: 8 magic "CAPSWSET", 4 version, 4 number of runs of the VM (oldest first), then per run of the VM 8 number
of ranges and per range 8 offset, 8 length; then the SHA-256 of everything before.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from agent.snapshots import files
from agent.snapshots.header_format import MAX_MEMORY_BYTES, PAGE

Range = tuple[int, int]
"""Offset and length in the memory, bytes, whole pages."""

REMEMBERED = 3
"""How many runs of the VM are looked back on."""

ENOUGH = 2
"""In how many of them a page must have been touched, if there were as many."""

MAX_RANGES = 1 << 16
"""Per run of the VM; the largest ones are kept. A first reply touches some 500."""

MAGIC = b"CAPSWSET"
VERSION = 1
FIXED = struct.Struct("<8sII")
COUNT = struct.Struct("<Q")
DIGEST_BYTES = 32
MAX_BYTES = FIXED.size + REMEMBERED * (COUNT.size + MAX_RANGES * 16) + DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """What the last runs touched, oldest first: at least one, at most REMEMBERED. Ranges are sorted and apart."""

    touched: tuple[tuple[Range, ...], ...]

    def ranges(self) -> tuple[Range, ...]:
        """What the next run will want: touched in ENOUGH of the remembered runs, or in the only one."""
        return tuple(_touched_by(self.touched, min(ENOUGH, len(self.touched))))

    def encode(self) -> bytes:
        """The file's content."""
        content = FIXED.pack(MAGIC, VERSION, len(self.touched))
        for ranges in self.touched:
            words = array("Q", [word for each in ranges for word in each])
            _swap_on_big_endian(words)
            content += COUNT.pack(len(ranges)) + words.tobytes()
        return content + hashlib.sha256(content).digest()


def combine(previous: WorkingSet | None, touched: Iterable[Range]) -> WorkingSet:
    """Add what one more run touched (in any order, whole pages); what was touched long ago is forgotten."""
    earlier = previous.touched if previous is not None else ()
    return WorkingSet((*earlier, _normal(touched))[-REMEMBERED:])


def decode(data: bytes) -> WorkingSet | None:
    """Read what `WorkingSet.encode` wrote; None for anything else. Takes memory in proportion to `data` only."""
    if not FIXED.size + DIGEST_BYTES <= len(data) <= MAX_BYTES:
        return None
    content = data[:-DIGEST_BYTES]
    magic, version, count = FIXED.unpack_from(content)
    if (magic, version) != (MAGIC, VERSION) or not 1 <= count <= REMEMBERED:
        return None
    if hashlib.sha256(content).digest() != data[-DIGEST_BYTES:]:
        return None
    position, touched = FIXED.size, []
    for _ in range(count):
        if position + COUNT.size > len(content):
            return None
        (number,) = COUNT.unpack_from(content, position)
        position += COUNT.size
        ranges = _ranges(content[position : position + number * 16], number)
        if ranges is None:
            return None
        touched.append(ranges)
        position += number * 16
    return WorkingSet(tuple(touched)) if position == len(content) else None


def read(path: Path) -> WorkingSet | None:
    """The working set in a file; None when there is none that can be used."""
    try:
        with path.open("rb") as file:
            return decode(file.read(MAX_BYTES + 1))
    except OSError:
        return None


def write(path: Path, working_set: WorkingSet) -> None:
    """Replace the file: whoever reads it finds the old one or the new one. Raises HostDiskFull, StoreFailed."""
    temporary = path.with_name(f".{path.name}.new")
    with files.reported(f"writing {path}"):
        files.unlink(temporary)
        try:
            _write(temporary, working_set.encode())
            files.rename(temporary, path)
        except OSError:
            files.unlink(temporary)
            raise


def _write(path: Path, content: bytes) -> None:

    descriptor = files.create(path)
    try:
        files.write_all(descriptor, memoryview(content))
    finally:
        os.close(descriptor)


def _touched_by(runs: tuple[tuple[Range, ...], ...], enough: int) -> Iterator[Range]:
    """What lies in at least `enough` of the runs, by one pass over all their ends."""
    ends = sorted(
        [(offset, 1) for run in runs for offset, _ in run] + [(sum(each), -1) for run in runs for each in run]
    )
    depth, begin = 0, 0
    # An end sorts before a beginning at the same place, so ranges that touch come out as two; that does no harm.
    for offset, change in ends:
        before, depth = depth, depth + change
        if before < enough <= depth:
            begin = offset
        elif depth < enough <= before and begin < offset:
            yield begin, offset - begin


def _normal(touched: Iterable[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for offset, length in sorted(touched):
        if (offset | length) % PAGE or offset < 0 or length < 0 or offset + length > MAX_MEMORY_BYTES:
            raise ValueError(f"no part of a memory: {length} bytes from {offset}")
        if merged and offset <= sum(merged[-1]):
            begin, before = merged[-1]
            merged[-1] = begin, max(before, offset + length - begin)
        elif length:
            merged.append((offset, length))
    if len(merged) > MAX_RANGES:
        merged = sorted(sorted(merged, key=lambda each: -each[1])[:MAX_RANGES])
    return tuple(merged)


def _ranges(data: bytes, number: int) -> tuple[Range, ...] | None:
    if len(data) != number * 16:
        return None
    words = array("Q")
    words.frombytes(data)
    _swap_on_big_endian(words)
    ranges = tuple(zip(words[0::2], words[1::2], strict=True))
    if any((offset | length) % PAGE or not length or offset + length > MAX_MEMORY_BYTES for offset, length in ranges):
        return None
    if any(sum(a) >= b[0] for a, b in pairwise(ranges)):
        return None
    return ranges


def _swap_on_big_endian(words: array[int]) -> None:
    if sys.byteorder == "big":
        words.byteswap()
