"""Overlays written without qemu-img, held against it: what it makes of them and what it would have made."""

from __future__ import annotations

import json
import subprocess

import pytest

from agent.storage.overlay import HostDiskFull
from agent.storage.qcow2 import Qcow2Overlays, chain
from agent.storage.qcow2_header import TABLE_SPAN

MIB = 1 << 20
SPAN_MB = TABLE_SPAN >> 20

SIZES = [1, 2, 100, SPAN_MB - 1, SPAN_MB, SPAN_MB + 1, 2 * SPAN_MB, 10 << 10, 1 << 20, 4 << 20]
"""MiB: both sides of where another second-level table is needed, up to 4 TiB."""


def qemu_img(*arguments):
    return subprocess.run(["qemu-img", *arguments], capture_output=True, check=True).stdout


def information(path):
    facts = json.loads(qemu_img("info", "--output=json", str(path)))
    return {name: value for name, value in facts.items() if name not in {"filename", "actual-size", "children"}}


@pytest.fixture
def small_base(tmp_path):
    """A raw image of 1 MiB of one byte."""
    path = tmp_path / "small.raw"
    path.write_bytes(b"b" * MIB)
    return path


@pytest.mark.parametrize("size_mb", SIZES)
async def test_qemu_takes_it_for_one_of_its_own(small_base, write, tmp_path, size_mb):
    """No complaint from `check`, the same facts as of qemu-img's own overlay, and first and last block hold data."""
    ours, reference = tmp_path / "ours", tmp_path / "reference"
    await Qcow2Overlays().create(small_base, ours, size_mb)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(small_base), str(reference), f"{size_mb}M")
    assert json.loads(qemu_img("check", "--output=json", str(ours)))["check-errors"] == 0
    assert information(ours) == information(reference)
    assert ours.stat().st_blocks <= reference.stat().st_blocks
    for path in (ours, reference):
        end = (size_mb << 20) - 4096
        await write(small_base, [path], "write -P 1 4k 4k", f"write -P 2 {end} 4k", "write -P 3 512k 128k")
        await write(small_base, [path], "discard 512k 64k", "read -P 1 4k 4k", f"read -P 2 {end} 4k", "read -P 98 0 4k")
    qemu_img("check", str(ours))
    assert b"identical" in qemu_img("compare", chain(small_base, [ours]), chain(small_base, [reference]))


async def test_it_grows_as_qemus_own_does(small_base, write, tmp_path):
    """Filled with 100 MiB in no order, `check` finds no leak and no error, and the file is no larger than need be."""
    overlay = tmp_path / "disk"
    await Qcow2Overlays().create(small_base, overlay, 4 << 20)
    offsets = [(number * 37 % 100) * 41_000 * MIB for number in range(100)]
    await write(small_base, [overlay], *(f"write -P 7 {offset} 1M" for offset in offsets))
    assert b"No errors were found" in qemu_img("check", str(overlay))
    await Qcow2Overlays().freeze(overlay, 4 << 20)
    assert overlay.stat().st_blocks * 512 < 110 * MIB


async def test_a_recorded_name_has_the_formats_bound(tmp_path):
    """A path too long for the header is a mistake that is said, and no file is left."""
    deep = tmp_path.joinpath(*["d" * 200] * 5)
    deep.mkdir(parents=True)
    (deep / "base").write_bytes(b"x")
    with pytest.raises(ValueError, match="1023 bytes"):
        await Qcow2Overlays().create(deep / "base", tmp_path / "disk", 64)
    assert not (tmp_path / "disk").exists()


async def test_a_disk_that_fills_up_between_the_writes(small_base, tmp_path, monkeypatch):
    """Whichever of its writes fails: typed, and no file is left."""
    from agent.storage import qcow2_writer  # noqa: PLC0415 - only to break it

    original = qcow2_writer.os.pwrite
    for successes in range(3):
        left = iter(range(successes))

        def pwrite(*arguments, left=left):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(qcow2_writer.os, "pwrite", pwrite)
            with pytest.raises(HostDiskFull):
                await Qcow2Overlays().create(small_base, tmp_path / "disk", 64)
        assert not (tmp_path / "disk").exists()
