from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from agent.images.bzimage import decompress, extract_vmlinux, has_pvh_entry
from agent.images.errors import BuildFailed, KernelUnusable

if TYPE_CHECKING:
    from collections.abc import Callable

SETUP_SECTORS = 3


def elf(*, note: int = 18, owner: bytes = b"Xen\0") -> bytes:
    """A 64-bit ELF with one program header: notes, of which the last is (owner, note)."""
    notes = struct.pack("<III4s8s", 4, 8, 5, b"Xen\0", b"xen-3.0\0")
    notes += struct.pack("<III4sQ", 4, 8, note, owner, 0x1000000)
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x20, 64)
    struct.pack_into("<HH", header, 0x36, 56, 1)
    program = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(notes), len(notes), 4)
    return bytes(header) + program + notes + bytes(5000)


def bzimage(compressed: bytes, size: int, *, version: int = 0x020F, gap: int = 40) -> bytes:
    """A bzImage: boot sector, setup sectors, `gap` bytes of decompressor, then the payload and its size."""
    payload = compressed + struct.pack("<I", size)
    head = bytearray((SETUP_SECTORS + 1) * 512)
    head[0x1F1] = SETUP_SECTORS
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, gap, len(payload))
    return bytes(head) + bytes(gap) + payload + b"after"


def gzip_of(data: bytes) -> bytes:
    """In a kernel gzip's own size field is the payload's trailer."""
    return gzip.compress(data)[:-4]


def through(*argv: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        if shutil.which(argv[0]) is None:
            pytest.skip(f"{argv[0]} is not installed")
        return subprocess.run(argv, input=data, capture_output=True, check=True, timeout=20).stdout

    return compress


@pytest.mark.parametrize(
    "compress",
    [
        gzip_of,
        lambda data: lzma.compress(data, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32),
        lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
        bz2.compress,
        through("zstd", "-c"),
        through("lz4", "-l", "-c"),
    ],
    ids=["gzip", "xz", "lzma", "bzip2", "zstd", "lz4"],
)
def test_every_compressor(compress: Callable[[bytes], bytes]) -> None:
    """Whatever the kernel was compressed with, the ELF file inside comes out byte for byte."""
    kernel = elf()
    assert extract_vmlinux(bzimage(compress(kernel), len(kernel))) == kernel


def test_whole_gzip_module() -> None:
    """Modules are whole gzip files, with the size field that a kernel's payload lacks."""
    assert decompress(gzip.compress(b"module" * 99)) == b"module" * 99


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"", "setup header"),
        (bytes(4096), "setup header"),
        (bzimage(gzip_of(elf()), len(elf()), version=0x0207), "boot protocol"),
        (bzimage(gzip_of(elf()), len(elf()))[:2100], "cut off"),
        (bzimage(gzip_of(elf()), 12), "its header says 12"),
        (bzimage(b"what is this", 12), "unknown way"),
        (bzimage(gzip_of(elf())[:10] + b"\xff" * 40, len(elf())), "damaged"),
        (bzimage(gzip_of(elf(note=17)), len(elf())), "PVH"),
        (bzimage(gzip_of(elf(owner=b"Xin\0")), len(elf())), "PVH"),
    ],
)
def test_refuses(image: bytes, says: str) -> None:
    """A file that is no bootable kernel is refused with the reason, not passed on to QEMU."""
    with pytest.raises(KernelUnusable, match=says):
        extract_vmlinux(image)


def test_damaged_for_the_program() -> None:
    """What zstd refuses is an error of the build that carries zstd's words."""
    through("zstd", "-c")(b"")
    with pytest.raises(BuildFailed, match="zstd"):
        decompress(b"\x28\xb5\x2f\xfd" + b"\xff" * 30)


@pytest.mark.parametrize("cut", [5, 63, 64, 100, 121, 130])
def test_cut_elf_has_no_pvh_entry(cut: int) -> None:
    """Headers that point past the end are no crash."""
    assert has_pvh_entry(elf()) is True
    assert has_pvh_entry(elf()[:cut]) is False
