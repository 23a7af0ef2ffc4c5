"""From a `bzImage` to the ELF kernel inside it, which `-M microvm` and Firecracker boot without firmware (PVH).

The payload is found through the setup header (Linux: Documentation/arch/x86/boot.rst); its last four bytes are the
size of what was compressed, whatever the compressor.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from typing import TYPE_CHECKING

from agent.images.commands import run
from agent.images.errors import KernelUnusable

if TYPE_CHECKING:
    from collections.abc import Callable

SETUP_SECTS = 0x1F1
HEADER_MAGIC = (0x202, b"HdrS")
PROTOCOL_VERSION = 0x206
PROTOCOL_WITH_PAYLOAD = 0x0208
PAYLOAD_OFFSET = 0x248
SECTOR = 512
TRAILER = 4
XEN_ELFNOTE_PHYS32_ENTRY = 18  # "PVH": the entry point for a VMM that starts the kernel in 32-bit mode
PT_NOTE = 4
DECOMPRESS_SECONDS = 120


def extract_vmlinux(image: bytes) -> bytes:
    """The uncompressed kernel of `image`, an ELF file that has a PVH entry point; else KernelUnusable."""
    payload = _payload(image)
    kernel = decompress(payload[:-TRAILER])
    size = int.from_bytes(payload[-TRAILER:], "little")
    if len(kernel) != size:
        raise KernelUnusable(f"the kernel is {len(kernel)} bytes after decompression, its header says {size}")
    if not has_pvh_entry(kernel):
        raise KernelUnusable("the kernel has no PVH entry point (CONFIG_PVH): a microVM cannot boot it")
    return kernel


def decompress(stream: bytes) -> bytes:
    """`stream` uncompressed; which compressor made it is told by its first bytes. KernelUnusable when none did."""
    for magic, decompressor in DECOMPRESSORS:
        if stream.startswith(magic):
            try:
                return decompressor(stream)
            except (zlib.error, lzma.LZMAError, OSError) as err:
                raise KernelUnusable(f"the compressed data is damaged: {err}") from err
    raise KernelUnusable(f"compressed in an unknown way (first bytes {stream[:6].hex()})")


def has_pvh_entry(elf: bytes) -> bool:
    """Whether the 64-bit ELF file carries Xen's note with the PVH entry point."""
    if elf[:5] != b"\x7fELF\x02":
        return False
    try:
        (table,) = struct.unpack_from("<Q", elf, 0x20)
        entry_size, count = struct.unpack_from("<HH", elf, 0x36)
        for index in range(count):
            kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", elf, table + index * entry_size)
            if kind == PT_NOTE and _names_pvh(elf[offset : offset + size]):
                return True
    except struct.error:
        return False
    return False


def _names_pvh(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_size, data_size, kind = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_size]
        if kind == XEN_ELFNOTE_PHYS32_ENTRY and name == b"Xen\0":
            return True
        at += 12 + -(-name_size // 4) * 4 + -(-data_size // 4) * 4
    return False


def _payload(image: bytes) -> bytes:
    at, magic = HEADER_MAGIC
    if image[at : at + len(magic)] != magic or len(image) < PAYLOAD_OFFSET + 8:
        raise KernelUnusable("not a bzImage: the setup header is missing")
    (version,) = struct.unpack_from("<H", image, PROTOCOL_VERSION)
    if version < PROTOCOL_WITH_PAYLOAD:
        raise KernelUnusable(f"boot protocol {version:#06x} does not say where the kernel lies")
    offset, length = struct.unpack_from("<II", image, PAYLOAD_OFFSET)
    start = ((image[SETUP_SECTS] or 4) + 1) * SECTOR + offset
    payload = image[start : start + length]
    if length <= TRAILER or len(payload) != length:
        raise KernelUnusable("the bzImage is cut off")
    return payload


def _gzip(stream: bytes) -> bytes:
    # Not gzip.decompress: in a kernel the stream's last field is the trailer that was cut off.
    return zlib.decompressobj(wbits=31).decompress(stream)


def _lzma(stream: bytes) -> bytes:
    return lzma.LZMADecompressor().decompress(stream)


def _bzip2(stream: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(stream)


def _zstd(stream: bytes) -> bytes:
    return run(["zstd", "-dc"], stdin=stream, seconds=DECOMPRESS_SECONDS)


def _lz4(stream: bytes) -> bytes:
    return run(["lz4", "-dc"], stdin=stream, seconds=DECOMPRESS_SECONDS)


# LZ4 and Zstandard are in no supported Python's standard library; Debian has both programs.
DECOMPRESSORS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\x00", _lzma),
    (b"\x5d\x00\x00", _lzma),
    (b"BZh", _bzip2),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"\x02\x21\x4c\x18", _lz4),
)
