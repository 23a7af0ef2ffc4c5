"""Sandboxes on real VMs: cold create and its parts, exec through each layer, files; baselines from the same guest."""

from __future__ import annotations

import fcntl
import os
import statistics
import struct
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from uuid import UUID

import httpx
import trio
from raw_tcp import raw_tcp, sink, wait_for_sink
from stage import connected, platform, show, user

from agent.actor.peer import OpenerPeer
from agent.images.store import ImageStore
from agent.net.addresses import GUEST_MAC
from agent.storage.qcow2 import Qcow2Overlays
from agent.vmm.driver import VmSpec
from agent.vmm.qemu import detect_qemu
from agent.wire.calls import CONTENT_CHANNEL
from capsule.hosts.links import HostLinks

IMAGES = Path(os.environ.get("CAPSULE_AGENT_IMAGES", "/var/lib/capsule/images"))
CREATES = 5
EXECS = 100
FILE_MB = 64


def percentiles(name: str, seconds: list[float], base: float | None = None, what: str = "") -> float:
    """Print p50 and p99 in ms; returns p50."""
    ordered = sorted(seconds)
    p50 = statistics.median(ordered) * 1000
    show(f"{name} p50", p50, "ms", base, what)
    show(f"{name} p99", ordered[int(len(ordered) * 0.99) - 1] * 1000, "ms")
    return p50


async def bare_boot(directory: Path) -> float:
    """Seconds of QEMU alone: spawn to the guest daemon's line on the console, with the same image and memory."""
    image = await trio.to_thread.run_sync(ImageStore(IMAGES).load, "minimal")
    driver = await detect_qemu()
    place = directory / "bare"
    directory.chmod(0o711)
    place.mkdir(mode=0o711)
    disk = place / "disk.qcow2"
    await Qcow2Overlays().create(image.rootfs, disk, image.disk_mb)
    subprocess.run(["ip", "tuntap", "add", "bare0", "mode", "tap", "vnet_hdr"], check=True)
    try:
        fd = await trio.to_thread.run_sync(_open_tap)
        spec = VmSpec(
            sandbox_id="bare", directory=place, vcpus=1, memory_mb=512, kernel=image.kernel,
            initramfs=image.initramfs, disk=disk, disk_format="qcow2", tap_fd=fd, mac=GUEST_MAC, uid=65534, gid=65534,
        )  # fmt: skip
        began = time.perf_counter()
        vm = await driver.boot(spec)
        while "CAPSULE-READY" not in await vm.console_tail():
            await trio.sleep(0.01)
        took = time.perf_counter() - began
        await vm.kill()
        os.close(fd)
    finally:
        subprocess.run(["ip", "link", "del", "bare0"], check=False)
    return took


def _open_tap() -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"bare0", 0x0002 | 0x1000 | 0x4000))
    return fd


def cold_creates(api: httpx.Client, log: Path, bare: float) -> list[dict]:
    """Create → first exec, and the agent's own account of the parts."""
    total, create = [], []
    made = []
    for _ in range(CREATES):
        began = time.perf_counter()
        sandbox = api.post("/sandboxes", json={}).raise_for_status().json()
        create.append(time.perf_counter() - began)
        api.post(f"/sandboxes/{sandbox['id']}/exec", json={"cmd": "true"}).raise_for_status()
        total.append(time.perf_counter() - began)
        made.append(sandbox)
    show("QEMU alone: spawn to guest daemon", bare * 1000, "ms")
    base = bare * 1000
    show("cold create (HTTP 201)", statistics.median(create) * 1000, "ms", base, "QEMU alone")
    show("cold create to first exec reply", statistics.median(total) * 1000, "ms", base, "QEMU alone")
    parts: dict[str, list[float]] = {}
    for line in log.read_text().splitlines():
        if "sandbox_running" in line:
            for word in line.split():
                key, _, value = word.partition("=")
                if key in {"queue", "slot", "overlay", "vmm", "kernel", "guest"}:
                    parts.setdefault(key, []).append(float(value))
    for name in ("queue", "slot", "overlay", "vmm", "kernel", "guest"):
        if name in parts:
            show(f"  {name}", statistics.median(parts[name]), "ms")
    return made


async def timed(call, count: int) -> list[float]:
    """Seconds of `count` calls, one after the other."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - began)
    return seconds


async def execs(api: httpx.Client, sandbox: dict, links: HostLinks, guest: OpenerPeer) -> None:
    """`true`, warm, through each layer in turn."""
    body = {"cmd": "true", "args": []}
    plain = UUID(sandbox["id"].removeprefix("sb-"))
    host = UUID(sandbox["host_id"].removeprefix("host-"))

    async def through_guest() -> None:
        await guest.call("exec", body, timeout=30)

    async def through_agent() -> None:
        await links.call(host, "exec", {"sandbox_id": str(plain), **body}, timeout=30)

    async def through_http() -> None:
        path = f"/sandboxes/{sandbox['id']}/exec"
        await trio.to_thread.run_sync(lambda: api.post(path, json=body).raise_for_status())

    await timed(through_http, 10)
    base = percentiles("exec in the guest alone", await timed(through_guest, EXECS))
    percentiles("exec through the agent", await timed(through_agent, EXECS), base, "guest alone")
    percentiles("exec through HTTP", await timed(through_http, EXECS), base, "guest alone")


async def files(api: httpx.Client, sandbox: dict, guest: OpenerPeer) -> None:
    """Upload and download through HTTP, beside raw TCP into the same guest and the guest daemon alone."""
    url = f"/sandboxes/{sandbox['id']}"
    api.post(
        f"{url}/exec", json={"cmd": "python3", "args": ["-c", sink(FILE_MB)], "background": True}
    ).raise_for_status()
    await wait_for_sink(sandbox["host_ip"], FILE_MB)
    up = statistics.median([await raw_tcp(sandbox["host_ip"], b"s", FILE_MB) for _ in range(3)])
    down = statistics.median([await raw_tcp(sandbox["host_ip"], b"r", FILE_MB) for _ in range(3)])
    content = os.urandom(1 << 20) * FILE_MB
    size = len(content) / 1e6

    async def guest_write() -> None:
        async with guest.open_stream("files.write", {"path": "/root/direct"}, timeout=600) as stream:
            await stream.send(content, CONTENT_CHANNEL)
            await stream.end()
            await stream.reply()

    async def http_write() -> None:
        form = {"path": (None, "/root/blob"), "file": ("blob", content)}
        await trio.to_thread.run_sync(lambda: api.post(f"{url}/files/write", files=form).raise_for_status())

    async def http_read() -> None:
        body = {"path": "/root/blob"}
        await trio.to_thread.run_sync(lambda: api.post(f"{url}/files/read", json=body).raise_for_status())

    show("raw TCP into the guest", up, "MB/s")
    show("file write, guest daemon alone", size / statistics.median(await timed(guest_write, 3)), "MB/s", up, "raw TCP")
    show("file upload through HTTP", size / statistics.median(await timed(http_write, 3)), "MB/s", up, "raw TCP")
    show("raw TCP out of the guest", down, "MB/s")
    show("file download through HTTP", size / statistics.median(await timed(http_read, 3)), "MB/s", down, "raw TCP")


async def main() -> None:
    """All of it, in order."""
    with platform(CAPSULE_AGENT_GOLDEN="false") as (data, ready):  # else a create would be no boot
        api = user(ready)
        bare = statistics.median([await bare_boot(Path(tempfile.mkdtemp(dir=data, prefix="b"))) for _ in range(3)])
        made = await trio.to_thread.run_sync(partial(cold_creates, api, data / "log", bare))
        for sandbox in made[1:]:
            await trio.to_thread.run_sync(api.delete, f"/sandboxes/{sandbox['id']}")
        async with connected(data, made[0]) as (links, guest):
            boot = (await guest.call("info", {}, timeout=30))["boot_ns"] / 1e6
            show("  of guest: kernel to daemon, its own clock", boot, "ms")
            await execs(api, made[0], links, guest)
            await files(api, made[0], guest)


if __name__ == "__main__":
    trio.run(main)
