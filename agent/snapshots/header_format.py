r"""The bytes of `mem.header`, version 1, little-endian:

    8  magic "CAPSMEM\n"          8  memory size            16  id of this generation's build
    4  version                     4  generation             16  id of its parent's build (nil: none)
    4  block size (4096)           4  zero                    8  number of entries

then per entry 8 offset, 8 length, 16 build id, 8 offset in that build's data; then the SHA-256 of everything before.
One memory has exactly one encoding: whatever could be written otherwise is refused.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add, or_, sub
from uuid import UUID

from agent.snapshots.columns import MAX_RUNS, NIL, Columns
from agent.snapshots.errors import HeaderDamaged

PAGE = 4096
"""The block size, in bytes: everything in a header is a multiple of it."""

MAX_MEMORY_BYTES = 1 << 42
MAX_BUILD_BYTES = 1 << 42
MAX_GENERATION = (1 << 32) - 1

MAGIC = b"CAPSMEM\n"
VERSION = 1
FIXED = struct.Struct("<8sIIQIIQ16s16s")
WORDS = 5
"""Words of 8 bytes in an entry."""

DIGEST_BYTES = 32
MAX_BYTES = FIXED.size + MAX_RUNS * WORDS * 8 + DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Fixed:
    """What a header says besides its runs."""

    memory_bytes: int
    generation: int
    build: UUID
    parent: UUID


def check_fixed(fixed: Fixed) -> None:
    """Raise ValueError for what no header may say."""
    if fixed.memory_bytes % PAGE or not PAGE <= fixed.memory_bytes <= MAX_MEMORY_BYTES:
        raise ValueError(f"impossible memory size {fixed.memory_bytes}")
    if not 1 <= fixed.generation <= MAX_GENERATION:
        raise ValueError(f"impossible generation {fixed.generation}")
    if fixed.build in {NIL, fixed.parent}:
        raise ValueError(f"impossible build {fixed.build} with parent {fixed.parent}")


def encode(columns: Columns, fixed: Fixed) -> bytes:
    """The file's content."""
    count = len(columns.starts)
    words = array("Q", bytes(count * WORDS * 8))
    words[0::WORDS] = columns.starts
    words[1::WORDS] = array("Q", map(sub, [*columns.starts[1:], fixed.memory_bytes], columns.starts))
    halves = [struct.unpack("<QQ", build.bytes) for build in columns.table]
    words[2::WORDS] = array("Q", [halves[which][0] for which in columns.which])
    words[3::WORDS] = array("Q", [halves[which][1] for which in columns.which])
    words[4::WORDS] = columns.data
    _swap_on_big_endian(words)
    content = FIXED.pack(
        MAGIC, VERSION, PAGE, fixed.memory_bytes, fixed.generation, 0, count, fixed.build.bytes, fixed.parent.bytes
    )
    content += words.tobytes()
    return content + hashlib.sha256(content).digest()


def decode(data: bytes, *, name: str) -> tuple[Columns, Fixed]:
    """Read and check a file's content. Raises HeaderDamaged naming it; takes memory in proportion to `data` only."""
    try:
        return _decode(memoryview(data))
    except ValueError as err:
        raise HeaderDamaged(f"{name} is damaged ({err}): restore it from a backup or remove the snapshot") from err


def _decode(data: memoryview) -> tuple[Columns, Fixed]:
    if len(data) < FIXED.size + DIGEST_BYTES:
        raise ValueError(f"only {len(data)} bytes long")
    content = data[:-DIGEST_BYTES]
    magic, version, block, memory_bytes, generation, zero, count, build, parent = FIXED.unpack_from(content)
    if magic != MAGIC:
        raise ValueError("no memory header")
    if version != VERSION:
        raise ValueError(f"version {version} instead of {VERSION}")
    if hashlib.sha256(content).digest() != data[-DIGEST_BYTES:]:
        raise ValueError("its checksum differs")
    if block != PAGE or zero:
        raise ValueError(f"block size {block}, reserved field {zero}")
    if not 1 <= count <= MAX_RUNS or len(content) != FIXED.size + count * WORDS * 8:
        raise ValueError(f"{count} entries in {len(data)} bytes")
    fixed = Fixed(memory_bytes, generation, UUID(bytes=build), UUID(bytes=parent))
    check_fixed(fixed)
    words = array("Q")
    words.frombytes(content[FIXED.size :])
    _swap_on_big_endian(words)
    return _columns(words, memory_bytes), fixed


def _columns(words: array[int], memory_bytes: int) -> Columns:
    starts, lengths, data = words[0::WORDS], words[1::WORDS], words[4::WORDS]
    if starts[0] != 0 or min(lengths) == 0 or list(map(add, starts, lengths)) != [*starts[1:], memory_bytes]:
        raise ValueError("its runs do not cover the memory in order")
    if (_bits(starts) | _bits(data)) % PAGE:
        raise ValueError("a run is not made of whole pages")
    if max(map(add, data, lengths)) > MAX_BUILD_BYTES:
        raise ValueError("a run lies outside any build")
    columns = Columns()
    known: dict[tuple[int, int], int] = {}
    for high, low in zip(words[2::WORDS], words[3::WORDS], strict=True):
        which = known.get((high, low))
        if which is None:
            which = known[high, low] = columns.index(UUID(bytes=struct.pack("<QQ", high, low)))
        columns.which.append(which)
    columns.starts, columns.data = starts, data
    _check_neighbours(columns, lengths)
    return columns


def _check_neighbours(columns: Columns, lengths: array[int]) -> None:
    nil = columns.index(NIL) if NIL in columns.table else -1
    if any(data for which, data in zip(columns.which, columns.data, strict=True) if which == nil):
        raise ValueError("a run of zeros has a place in a build")
    ends = map(add, columns.data, lengths)
    rows = pairwise(zip(columns.which, columns.data, ends, strict=True))
    if any(a[0] == b[0] and (a[0] == nil or a[2] == b[1]) for a, b in rows):
        raise ValueError("two runs should be one")


def _bits(values: Iterable[int]) -> int:
    return reduce(or_, values, 0)


def _swap_on_big_endian(words: array[int]) -> None:
    if sys.byteorder == "big":
        words.byteswap()
