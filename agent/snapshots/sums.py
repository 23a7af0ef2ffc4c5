r"""`sums`: the checksums of a build's data file, little-endian:

8 magic "CAPSSUM\n", 4 version, 4 block size, 8 size of the data, 8 number of blocks, then 8 bytes (XXH3-64) per block
of the data, the last of which may be short, then the SHA-256 of everything before.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array

from agent.snapshots.errors import DataDamaged

CHECKSUM_BLOCK = 65536
"""Bytes of data under one checksum."""

MAGIC = b"CAPSSUM\n"
VERSION = 1
FIXED = struct.Struct("<8sIIQQ")
DIGEST_BYTES = 32


def encoded_size(data_bytes: int) -> int:
    """How large the checksums of so much data are."""
    return FIXED.size + _blocks(data_bytes) * 8 + DIGEST_BYTES


def encode(sums: array[int], data_bytes: int) -> bytes:
    """The file's content."""
    words = array("Q", sums)
    _swap_on_big_endian(words)
    content = FIXED.pack(MAGIC, VERSION, CHECKSUM_BLOCK, data_bytes, len(words)) + words.tobytes()
    return content + hashlib.sha256(content).digest()


def decode(data: bytes, *, name: str) -> tuple[array[int], int]:
    """The checksums of the blocks and the size of the data. Raises DataDamaged naming the file `name`."""
    try:
        return _decode(memoryview(data))
    except ValueError as err:
        raise DataDamaged(f"{name} is damaged ({err}): restore it from a backup or remove the snapshot") from err


def _decode(data: memoryview) -> tuple[array[int], int]:
    if len(data) < FIXED.size + DIGEST_BYTES:
        raise ValueError(f"only {len(data)} bytes long")
    content = data[:-DIGEST_BYTES]
    magic, version, block, data_bytes, count = FIXED.unpack_from(content)
    if (magic, version, block) != (MAGIC, VERSION, CHECKSUM_BLOCK):
        raise ValueError(f"no checksums of version {VERSION}")
    if hashlib.sha256(content).digest() != data[-DIGEST_BYTES:]:
        raise ValueError("its own checksum differs")
    if count != _blocks(data_bytes) or len(data) != encoded_size(data_bytes):
        raise ValueError(f"{count} checksums for {data_bytes} bytes, in {len(data)} bytes")
    words = array("Q")
    words.frombytes(content[FIXED.size :])
    _swap_on_big_endian(words)
    return words, data_bytes


def _blocks(data_bytes: int) -> int:
    return -(-data_bytes // CHECKSUM_BLOCK)


def _swap_on_big_endian(words: array[int]) -> None:
    if sys.byteorder == "big":
        words.byteswap()
