"""What is particular to qcow2 files and to qemu-img: locks, the tool's failures, and being stopped half way."""

from __future__ import annotations

import os
import subprocess
from functools import partial

import pytest
import trio

from agent.storage import qcow2
from agent.storage.overlay import HostDiskFull, OverlayBusy, StorageTimeout, StorageToolFailed
from agent.storage.qcow2 import Qcow2Overlays, chain


def tool(tmp_path, script):
    """A stand-in for qemu-img."""
    path = tmp_path / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def prompt(qemu_io):
    """Wait until it takes the next command; it takes one line at a time."""
    said = b""
    while not said.endswith(b"qemu-io> "):
        more = await qemu_io.stdout.receive_some()
        assert more, said
        said += more
    return said


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "capsule-test", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


async def test_what_the_guest_wrote_is_in_the_flattened_image(base, write, tmp_path):
    """Blocks of the overlay win over those of the base."""
    overlays = Qcow2Overlays()
    overlay, target = tmp_path / "disk", tmp_path / "flat"
    await overlays.create(base, overlay, 64)
    await write(base, [overlay], "write -P 0x41 0 4k")
    await overlays.flatten(base, overlay, target)
    content = target.read_bytes()
    assert content[:4096] == b"A" * 4096
    assert content[4096 : 4 << 20] == base.read_bytes()[4096:]


async def test_the_base_is_never_probed(base, tmp_path):
    """A base whose content looks like a qcow2 file naming another file is still read as the raw disk it is."""
    await trio.run_process(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(tmp_path / "x")]
    )
    overlays = Qcow2Overlays()
    await overlays.create(tmp_path / "x", tmp_path / "disk", 64)
    await overlays.flatten(tmp_path / "x", tmp_path / "disk", tmp_path / "flat")
    assert (tmp_path / "flat").read_bytes()[:4] == b"QFI\xfb"


@pytest.fixture
async def in_use(base):
    """Hold an image open for writing, with something written and flushed, as a stopped VM does."""

    async def use(image, nursery):
        start = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
        user = await nursery.start(start, ["qemu-io", chain(base, [image])])
        for command in (b"write -P 0x41 1M 256k\n", b"flush\n"):
            await prompt(user)
            await user.stdin.send_all(command)
        await prompt(user)

    return use


async def test_an_overlay_in_use_is_not_flattened_or_merged(base, in_use, tmp_path):
    """The image lock of a running VMM is respected."""
    overlays = Qcow2Overlays()
    overlay = tmp_path / "disk"
    await overlays.create(base, overlay, 64)
    async with trio.open_nursery() as nursery:
        await in_use(overlay, nursery)
        with pytest.raises(OverlayBusy):
            await overlays.flatten(base, overlay, tmp_path / "flat")
        with pytest.raises(OverlayBusy, match="disk"):
            await overlays.merge(base, [overlay], tmp_path / "merged")
        nursery.cancel_scope.cancel()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.raw", "disk"]


async def test_an_overlay_in_use_is_frozen(base, in_use, tmp_path):
    """A pause freezes the overlay while the stopped VMM has it open, and what was flushed is in it."""
    overlays = Qcow2Overlays()
    overlay = tmp_path / "disk"
    await overlays.create(base, overlay, 64)
    async with trio.open_nursery() as nursery:
        await in_use(overlay, nursery)
        await overlays.freeze(overlay, 64)
        frozen = tmp_path / "layer"
        frozen.write_bytes(overlay.read_bytes())
        nursery.cancel_scope.cancel()
    await overlays.flatten(base, frozen, tmp_path / "flat")
    assert (tmp_path / "flat").read_bytes()[1 << 20 : 5 << 18] == b"A" * (256 << 10)


async def test_layers_that_vms_read_are_merged(base, write, tmp_path):
    """Compaction needs no VM to stop that reads the same layers."""
    overlays = Qcow2Overlays()
    layer, disk = tmp_path / "layer", tmp_path / "disk"
    await overlays.create(base, layer, 64)
    await overlays.create(base, disk, 64, layers=[layer])
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
        user = await nursery.start(start, ["qemu-io", chain(base, [layer, disk])])
        await prompt(user)  # the images are open
        await overlays.merge(base, [layer], tmp_path / "merged")
        nursery.cancel_scope.cancel()


@pytest.mark.host
async def test_a_full_disk_is_said_and_leaves_nothing(base, write, small_disk, tmp_path):
    """On a file system of 64 KiB: HostDiskFull from each call that writes, and nothing half-written."""
    overlays = Qcow2Overlays()
    await overlays.create(base, tmp_path / "disk", 64)
    await write(base, [tmp_path / "disk"], "write -P 1 0 1M")
    with pytest.raises(HostDiskFull, match="No space left"):
        await overlays.merge(base, [tmp_path / "disk"], small_disk / "merged")
    with pytest.raises(HostDiskFull, match="No space left"):
        await overlays.flatten(base, tmp_path / "disk", small_disk / "flat")
    assert list(small_disk.iterdir()) == []
    (small_disk / "ballast").write_bytes(b"x" * (60 << 10))
    with pytest.raises(HostDiskFull, match="No space left"):
        await overlays.create(base, small_disk / "disk", 64)
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.mark.host
async def test_a_disk_that_met_a_full_host_is_still_frozen(base, small_disk):
    """The guest's writes failed for want of room, then there was room again: what is left is whole, not cut off."""
    overlay = small_disk / "disk"
    await Qcow2Overlays().create(base, overlay, 4096)
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
        user = await nursery.start(start, ["qemu-io", chain(base, [overlay])])
        for number in range(8):
            await prompt(user)
            await user.stdin.send_all(b"write -P 1 %dM 100k\n" % (number * 500))
        assert b"No space left" in await prompt(user)
        await trio.run_process(["mount", "-o", "remount,size=1m", str(small_disk)])
        await user.stdin.send_all(b"flush\n")
        await prompt(user)
        await Qcow2Overlays().freeze(overlay, 4096)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def disk(base, tmp_path):
    """An overlay."""
    await Qcow2Overlays().create(base, tmp_path / "disk", 64)
    return tmp_path / "disk"


async def test_a_tool_that_hangs_is_ended(base, disk, tmp_path, monkeypatch):
    """Out of time: StorageTimeout, the process is gone, and so is the file that had its name claimed."""
    monkeypatch.setattr(qcow2, "BULK_TIMEOUT", 0.2)
    overlays = Qcow2Overlays(tool(tmp_path, "exec sleep 1000"))
    with pytest.raises(StorageTimeout):
        await overlays.flatten(base, disk, tmp_path / "flat")
    assert not [path for path in tmp_path.iterdir() if "flat" in path.name]


async def test_cancelled_half_way_leaves_nothing(base, disk, tmp_path):
    """The caller gives up while the tool writes: no process, no file."""
    started = tmp_path / "started"
    os.mkfifo(started)
    overlays = Qcow2Overlays(tool(tmp_path, f"echo $$ > {started}; exec sleep 1000"))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlays.flatten, base, disk, tmp_path / "flat")
            pid = int(await trio.to_thread.run_sync(started.read_text, abandon_on_cancel=True))
            nursery.cancel_scope.cancel()
    assert not [path for path in tmp_path.iterdir() if "flat" in path.name]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_an_unknown_failure_keeps_the_tools_words(base, disk, tmp_path):
    """Whatever qemu-img says reaches the log."""
    overlays = Qcow2Overlays(tool(tmp_path, "echo 'qemu-img: the moon is wrong' >&2; exit 1"))
    with pytest.raises(StorageToolFailed, match="the moon is wrong"):
        await overlays.flatten(base, disk, tmp_path / "flat")
    assert not [path for path in tmp_path.iterdir() if "flat" in path.name]


async def test_a_missing_tool_is_said_with_the_remedy(base, disk, tmp_path):
    """Without qemu-img the message says how to get it."""
    with pytest.raises(StorageToolFailed, match="apt-get install qemu-utils"):
        await Qcow2Overlays("/nonexistent/qemu-img").flatten(base, disk, tmp_path / "flat")
    assert not [path for path in tmp_path.iterdir() if "flat" in path.name]
