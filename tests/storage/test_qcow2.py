"""What is particular to overlays made by qemu-img: the tool's failures, and being stopped half way."""

from __future__ import annotations

import os
import subprocess
from functools import partial

import pytest
import trio

from agent.storage import qcow2
from agent.storage.overlay import HostDiskFull, OverlayBusy, StorageTimeout, StorageToolFailed
from agent.storage.qcow2 import Qcow2Overlays


def tool(tmp_path, script):
    """A stand-in for qemu-img."""
    path = tmp_path / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "capsule-test", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


async def test_what_the_guest_wrote_is_in_the_flattened_image(base, tmp_path):
    """Blocks of the overlay win over those of the base."""
    overlays = Qcow2Overlays()
    overlay, target = tmp_path / "disk", tmp_path / "flat"
    await overlays.create(base, overlay, 64)
    await trio.run_process(["qemu-io", "-f", "qcow2", "-c", "write -P 0x41 0 4k", str(overlay)], capture_stdout=True)
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


async def test_an_overlay_in_use_is_not_flattened(base, tmp_path):
    """The image lock of a running VMM is respected."""
    overlays = Qcow2Overlays()
    overlay = tmp_path / "disk"
    await overlays.create(base, overlay, 64)
    use = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
    async with trio.open_nursery() as nursery:
        user = await nursery.start(use, ["qemu-io", "-f", "qcow2", str(overlay)])
        await user.stdout.receive_some(1)  # its prompt: the image is open
        with pytest.raises(OverlayBusy):
            await overlays.flatten(base, overlay, tmp_path / "flat")
        nursery.cancel_scope.cancel()
    assert not (tmp_path / "flat").exists()


@pytest.mark.host
async def test_a_full_disk_is_said_and_leaves_nothing(base, small_disk):
    """On a file system of 64 KiB: HostDiskFull, no half-written overlay."""
    with pytest.raises(HostDiskFull, match="No space left"):
        await Qcow2Overlays().create(base, small_disk / "disk", 64)
    assert list(small_disk.iterdir()) == []


async def test_a_tool_that_hangs_is_ended(base, tmp_path, monkeypatch):
    """Out of time: StorageTimeout, the process is gone, and so is the file that had its name claimed."""
    monkeypatch.setattr(qcow2, "CREATE_TIMEOUT", 0.2)
    overlays = Qcow2Overlays(tool(tmp_path, "exec sleep 1000"))
    with pytest.raises(StorageTimeout):
        await overlays.create(base, tmp_path / "disk", 64)
    assert not (tmp_path / "disk").exists()


async def test_cancelled_half_way_leaves_nothing(base, tmp_path):
    """The caller gives up while the tool writes: no process, no file."""
    started = tmp_path / "started"
    os.mkfifo(started)
    overlays = Qcow2Overlays(tool(tmp_path, f"echo $$ > {started}; exec sleep 1000"))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlays.create, base, tmp_path / "disk", 64)
            pid = int(await trio.to_thread.run_sync(started.read_text, abandon_on_cancel=True))
            nursery.cancel_scope.cancel()
    assert not (tmp_path / "disk").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_an_unknown_failure_keeps_the_tools_words(base, tmp_path):
    """Whatever qemu-img says reaches the log."""
    overlays = Qcow2Overlays(tool(tmp_path, "echo 'qemu-img: the moon is wrong' >&2; exit 1"))
    with pytest.raises(StorageToolFailed, match="the moon is wrong"):
        await overlays.create(base, tmp_path / "disk", 64)
    assert not (tmp_path / "disk").exists()


async def test_a_missing_tool_is_said_with_the_remedy(base, tmp_path):
    """Without qemu-img the message says how to get it."""
    with pytest.raises(StorageToolFailed, match="apt-get install qemu-utils"):
        await Qcow2Overlays("/nonexistent/qemu-img").create(base, tmp_path / "disk", 64)
    assert not (tmp_path / "disk").exists()
