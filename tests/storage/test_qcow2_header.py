"""What freeze believes of a file that a hostile VMM may have written: nothing but what we write ourselves."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.storage.overlay import OverlayDamaged
from agent.storage.qcow2 import Qcow2Overlays
from agent.storage.qcow2_header import CLUSTER_BYTES, Header, decode, encode
from agent.storage.qcow2_image import opened

MIB = 1 << 20
HEADER = Header(64 * MIB, 1, CLUSTER_BYTES, 3 * CLUSTER_BYTES, 1)

TAMPERED = {
    "magic": (0, ">I", 0x514649FA),
    "version 2": (4, ">I", 2),
    "version 4": (4, ">I", 4),
    "backing name before the extensions": (8, ">Q", 8),
    "backing name beyond the cluster": (8, ">Q", CLUSTER_BYTES),
    "long backing name": (16, ">I", 1024),
    "small clusters": (20, ">I", 9),
    "huge clusters": (20, ">I", 21),
    "no cluster": (20, ">I", 0xFFFFFFFF),
    "smaller disk": (24, ">Q", 63 * MIB),
    "larger disk": (24, ">Q", 65 * MIB),
    "odd disk": (24, ">Q", 64 * MIB + 512),
    "no disk": (24, ">Q", 0),
    "endless disk": (24, ">Q", 1 << 63),
    "encryption": (32, ">I", 1),
    "luks": (32, ">I", 2),
    "no first-level table": (36, ">I", 0),
    "huge first-level table": (36, ">I", 0xFFFFFFFF),
    "first-level table unaligned": (40, ">Q", CLUSTER_BYTES + 512),
    "first-level table in the header": (40, ">Q", 0),
    "first-level table beyond the end": (40, ">Q", 1 << 40),
    "refcounts unaligned": (48, ">Q", CLUSTER_BYTES + 8),
    "refcounts in the header": (48, ">Q", 0),
    "refcounts beyond the end": (48, ">Q", 1 << 62),
    "no refcounts": (56, ">I", 0),
    "huge refcounts": (56, ">I", 0xFFFFFFFF),
    "refcounts longer than the file": (56, ">I", 100),
    "internal snapshots": (60, ">I", 1),
    "dirty": (72, ">Q", 1),
    "corrupt": (72, ">Q", 2),
    "external data file": (72, ">Q", 4),
    "compression type": (72, ">Q", 8),
    "subclusters": (72, ">Q", 16),
    "unknown feature": (72, ">Q", 1 << 63),
    "bitmaps": (88, ">Q", 1),
    "raw external data": (88, ">Q", 2),
    "refcounts of one bit": (96, ">I", 0),
    "refcounts of 2**99 bits": (96, ">I", 99),
    "short header": (100, ">I", 72),
    "header beyond the cluster": (100, ">I", CLUSTER_BYTES + 8),
    "zstd": (104, ">B", 1),
    "data file extension": (112, ">I", 0x44415441),
    "encryption extension": (112, ">I", 0x0537BE77),
    "endless extension": (116, ">I", 0xFFFFFFFF),
}


@pytest.fixture
async def disk(base, tmp_path):
    """An empty overlay of 64 MiB."""
    await Qcow2Overlays().create(base, tmp_path / "disk", 64)
    return tmp_path / "disk"


def patch(path, offset, form, value):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, value))


@pytest.mark.parametrize("what", TAMPERED)
async def test_a_tampered_header_is_refused(base, disk, tmp_path, what):
    """Each field set to what we never write: typed, naming the file, by each call that would go on to read it."""
    patch(disk, *TAMPERED[what])
    overlays = Qcow2Overlays("/nonexistent/qemu-img")  # refused before any tool sees it
    with pytest.raises(OverlayDamaged, match=str(disk)):
        await overlays.freeze(disk, 64)
    if "disk" in what:
        return  # a size that is only not the sandbox's is for freeze to see, which is told the size
    with pytest.raises(OverlayDamaged, match=str(disk)):
        await overlays.merge(base, [disk], tmp_path / "merged")
    with pytest.raises(OverlayDamaged, match=str(disk)):
        await overlays.flatten(base, disk, tmp_path / "flat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.raw", "disk"]


async def test_an_overlay_that_is_cut_off_is_refused(base, disk, write):
    """Wherever a file with data ends too early, down to one cluster: never frozen as if it were whole."""
    await write(base, [disk], "write -P 1 0 1M", "write -P 1 30M 64k")
    whole = disk.read_bytes()
    await Qcow2Overlays().freeze(disk, 64)
    for end in (0, 50, 600, CLUSTER_BYTES, 3 * CLUSTER_BYTES, len(whole) // 2, len(whole) - CLUSTER_BYTES):
        os.truncate(disk, end)
        with pytest.raises(OverlayDamaged, match=str(disk)):
            await Qcow2Overlays().freeze(disk, 64)
        disk.write_bytes(whole)


async def test_a_table_outside_the_file_is_refused(disk):
    """Entries of the first-level table and of the refcount table that lead beyond the end or amid a cluster."""
    with opened(disk) as image:
        tables = (image.header.l1_offset, image.header.refcount_table_offset)
    good = disk.read_bytes()
    for table in tables:
        for value in (1 << 50, 2 * CLUSTER_BYTES + 512, 0x200):
            patch(disk, table, ">Q", value)
            with pytest.raises(OverlayDamaged, match=str(disk)):
                await Qcow2Overlays().freeze(disk, 64)
            disk.write_bytes(good)


@pytest.mark.parametrize("name", ["/etc/shadow", "pipe", "qcow2", "nbd+unix:///?socket=/nonexistent", "json:{}"])
async def test_a_recorded_name_is_never_opened(base, disk, write, tmp_path, name):
    """Freeze, flatten, merge and a layer on top: none of them fails over, waits for or reads what the header names."""
    overlays = Qcow2Overlays()
    await write(base, [disk], "write -P 0x41 0 64k")
    path = str(tmp_path / name) if name in {"pipe", "qcow2"} else name
    if name == "pipe":
        os.mkfifo(path)
    if name == "qcow2":
        (tmp_path / name).write_bytes(b"another file, which is no qcow2 image")
    with opened(disk) as image:
        good = image.header
    with disk.open("r+b") as file:
        file.write(encode(good, (path, "qcow2")))
    with trio.fail_after(20):
        await overlays.freeze(disk, 64)
        await overlays.create(base, tmp_path / "top", 64, layers=[disk])
        await overlays.merge(base, [disk, tmp_path / "top"], tmp_path / "merged")
        await overlays.flatten(base, tmp_path / "top", tmp_path / "flat", layers=[disk])
        await overlays.flatten(base, tmp_path / "merged", tmp_path / "same")
    expected = b"A" * CLUSTER_BYTES + base.read_bytes()[CLUSTER_BYTES:]
    assert (tmp_path / "flat").read_bytes()[: 4 * MIB] == expected
    assert (tmp_path / "same").read_bytes() == (tmp_path / "flat").read_bytes()


async def test_what_is_no_regular_file_is_refused(disk, tmp_path):
    """A link, a pipe nobody writes to, a directory in the overlay's place: refused, not followed or waited for."""
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(disk)
    os.mkfifo(pipe)
    with trio.fail_after(20):
        for path in (link, pipe, tmp_path):
            with pytest.raises(OverlayDamaged, match=str(path)):
                await Qcow2Overlays().freeze(path, 64)


async def test_counts_of_what_is_not_there_are_not_read(disk, monkeypatch):
    """The largest table, whose million entries all name one block of zeros: refused at once, not followed."""
    table, zeros = disk.stat().st_size // CLUSTER_BYTES + 1, disk.stat().st_size // CLUSTER_BYTES
    with disk.open("r+b") as file:
        file.seek(48)
        file.write(struct.pack(">QI", table * CLUSTER_BYTES, 128))
        file.seek(table * CLUSTER_BYTES)
        file.write(struct.pack(">Q", zeros * CLUSTER_BYTES) * (128 * CLUSTER_BYTES // 8))
    reads = []
    pread = os.pread

    def count(*arguments):
        reads.append(arguments)
        assert len(reads) < 10
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", count)
    with pytest.raises(OverlayDamaged, match="beyond"):
        await Qcow2Overlays().freeze(disk, 64)


@given(cluster=st.binary(max_size=300), file_bytes=st.integers(0, 1 << 40))
def test_random_bytes_never_raise_anything_else(cluster, file_bytes):
    """A header or OverlayDamaged, with and without the magic number in front."""
    for start in (b"", b"QFI\xfb\0\0\0\3"):
        with contextlib.suppress(OverlayDamaged):
            decode(start + cluster, file_bytes, name="disk")


@given(changes=st.lists(st.tuples(st.integers(0, 143), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_never_raise_anything_else(changes):
    """Headers that are almost right are refused, or their tables lie in the file."""
    cluster = bytearray(encode(HEADER, ("/base", "raw")))
    for at, to in changes:
        cluster[at % len(cluster)] = to
    with contextlib.suppress(OverlayDamaged):
        header = decode(bytes(cluster), 4 * CLUSTER_BYTES, name="disk")
        assert max(header.l1_offset, header.refcount_table_offset) < 4 * CLUSTER_BYTES


@settings(max_examples=100)
@given(changes=st.lists(st.tuples(st.integers(0, 6 * 8192), st.integers(0, 2**64 - 1)), min_size=1, max_size=6))
def test_changed_words_of_a_file_never_raise_anything_else(changes):
    """Any eight bytes of tables and header of a small overlay: frozen or refused, and nothing else."""
    with TemporaryDirectory() as directory:
        base, disk = Path(directory, "base"), Path(directory, "disk")
        base.write_bytes(b"x" * 4096)
        trio.run(Qcow2Overlays().create, base, disk, 64)
        with disk.open("r+b") as file:
            for word, value in changes:
                file.seek(word * 8)
                file.write(struct.pack(">Q", value))
        with contextlib.suppress(OverlayDamaged), opened(disk) as image:
            image.check_whole()
