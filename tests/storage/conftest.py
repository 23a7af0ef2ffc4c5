"""Both overlay drivers, a base image, and what a guest does to a disk."""

from __future__ import annotations

import shutil

import pytest
import trio

from agent.storage.fake import BLOCK_BYTES, FakeOverlays
from agent.storage.qcow2 import Qcow2Overlays, chain

BASE_MB = 4


@pytest.fixture(params=["fake", "qcow2"])
def overlays(request):
    if request.param == "fake":
        return FakeOverlays()
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed (apt-get install qemu-utils)")
    return Qcow2Overlays()


@pytest.fixture
def base(tmp_path):
    """A raw image of BASE_MB MiB, all zeros but its first block and its last."""
    path = tmp_path / "base.raw"
    with path.open("wb") as file:
        file.write(b"first".ljust(4096, b"\0"))
        file.seek((BASE_MB << 20) - 4096)
        file.write(b"last".ljust(4096, b"\0"))
    return path


@pytest.fixture
def write():
    """Run qemu-io commands on the disk that base and overlays (bottom to top) are, as its VM would."""

    async def write(base, overlays, *commands):
        # What a VMM does with discards: see agent/vmm/qemu_command.py.
        top = chain(base, overlays).replace('"driver":"qcow2"', '"driver":"qcow2","discard":"unmap"', 1)
        arguments = [argument for command in commands for argument in ("-c", command)]
        done = await trio.run_process(["qemu-io", "-d", "unmap", *arguments, top], capture_stdout=True)
        assert b"failed" not in done.stdout

    return write


@pytest.fixture
def fill(overlays, base, write):
    """Fill a block of BLOCK_BYTES with one byte value, through whichever driver the test has."""

    async def fill(overlay, block, value, *, layers=()):
        if isinstance(overlays, FakeOverlays):
            overlays.put(overlay, block, value)
            return
        place = f"{block * BLOCK_BYTES} {BLOCK_BYTES}"
        await write(base, [*layers, overlay], f"write -P {value} {place}" if value else f"write -z {place}")

    return fill


@pytest.fixture
def read(overlays, base, tmp_path):
    """Return the bytes of the disk that the overlays (bottom to top) are."""

    async def read(*chain):
        target = tmp_path / "read"
        await overlays.flatten(base, chain[-1], target, layers=chain[:-1])
        content = target.read_bytes()
        target.unlink()
        return content

    return read
