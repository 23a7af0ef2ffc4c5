"""QEMU's own way to bring a VM back: the whole memory in the migration stream, read before the first instruction."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from agent.guest.client import GuestLink
from agent.images.store import ImageStore
from agent.net.addresses import GATEWAY_ADDRESS, GUEST_ADDRESS, GUEST_MAC, GUEST_PREFIX
from agent.storage.qcow2 import Qcow2Overlays
from agent.vmm import qmp
from agent.vmm.driver import VmSpec
from agent.vmm.qemu import QemuDriver, detect_qemu
from agent.vmm.qemu_control import CONTROL_SOCKET

IMAGES = Path(os.environ.get("CAPSULE_AGENT_IMAGES", "/var/lib/capsule/images"))
TAP = "bench0"
UNPRIVILEGED = 65534
SECONDS = 120
POLL = 0.002
NO_LIMIT = 1 << 40
TUNSETIFF, TAP_FLAGS = 0x400454CA, 0x0002 | 0x1000 | 0x4000


def open_tap(name: str) -> int:
    """A descriptor of a tap device that there is."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
    return fd


class FullRestore:
    """A guest of its own, saved once by QEMU; `restore` brings it back as often as wanted."""

    def __init__(self, root: Path, driver: QemuDriver) -> None:
        self._root = root
        self._driver = driver
        self._state = root / "state"
        self._number = 0
        self.steps: list[dict[str, float]] = []
        """Of each restore, in ms."""

    @classmethod
    @asynccontextmanager
    async def of(cls, root: Path, memory_mb: int, *commands: str):
        """The guest after these commands. Its tap has the gateway's address, in this network namespace."""
        root.mkdir(mode=0o711)
        subprocess.run(["ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr"], check=True)
        subprocess.run(["ip", "addr", "add", f"{GATEWAY_ADDRESS}/{GUEST_PREFIX}", "dev", TAP], check=True)
        subprocess.run(["ip", "link", "set", TAP, "up"], check=True)
        try:
            made = cls(root, await detect_qemu())
            await made._save(memory_mb, commands)
            yield made
        finally:
            subprocess.run(["ip", "link", "del", TAP], check=False)

    async def restore(self, *command: str) -> float:
        """Seconds from the start of QEMU to the command's answer."""
        self._number += 1
        spec = self._spec(f"restore{self._number}")
        shutil.copyfile(self._root / "disk.qcow2", spec.disk)
        launcher = dataclasses.replace(self._driver._launcher, shim=None)  # noqa: SLF001 - plain QEMU, else as ours
        driver = QemuDriver(launcher, version="", cgroups=self._driver._cgroups)  # noqa: SLF001
        state = os.open(self._state, os.O_RDONLY | os.O_CLOEXEC)
        marks = {"": time.perf_counter()}
        vm = await trio.to_thread.run_sync(driver._spawn, spec, Path("none"))  # noqa: SLF001 - `-incoming defer`
        try:
            async with qmp.connect(spec.directory, CONTROL_SOCKET, timeout=SECONDS) as client:
                marks["start"] = time.perf_counter()
                await client.give("state", state, timeout=SECONDS)
                await client.execute("migrate-incoming", timeout=SECONDS, uri="fd:state")
                while (await client.execute("query-status", timeout=SECONDS))["status"] == "inmigrate":
                    await trio.sleep(POLL)
                marks["load"] = time.perf_counter()
                await client.execute("cont", timeout=SECONDS)
            async with _linked() as guest:
                marks["guest"] = time.perf_counter()
                await _run(guest, command)
            marks["exec"] = time.perf_counter()
            self.steps.append({name: (end - begin) * 1000 for begin, (name, end) in _steps(marks)})
            return marks["exec"] - marks[""]
        finally:
            await vm.kill()
            os.close(state)
            os.close(spec.tap_fd)
            shutil.rmtree(spec.directory)

    def stream_bytes(self) -> int:
        """What it reads each time."""
        return self._state.stat().st_size

    async def _save(self, memory_mb: int, commands: tuple[str, ...]) -> None:
        self._memory_mb = memory_mb
        self._image = await trio.to_thread.run_sync(ImageStore(IMAGES).load, "minimal")
        spec = self._spec("saved")
        await Qcow2Overlays().create(self._image.rootfs, spec.disk, self._image.disk_mb)
        vm = await self._driver.boot(spec)
        try:
            async with _linked() as guest:
                for command in commands:
                    await _run(guest, ("/bin/sh", "-c", command))
            await vm.pause()
            with self._state.open("wb") as file:
                async with qmp.connect(spec.directory, CONTROL_SOCKET, timeout=SECONDS) as client:
                    await client.execute("migrate-set-parameters", timeout=SECONDS, **{"max-bandwidth": NO_LIMIT})
                    await client.give("state", file.fileno(), timeout=SECONDS)
                    await client.execute("migrate", timeout=SECONDS, uri="fd:state")
                    while (answer := await client.execute("query-migrate", timeout=SECONDS))["status"] != "completed":
                        if answer["status"] == "failed":
                            sys.exit(f"QEMU's own save failed: {answer}")
                        await trio.sleep(POLL)
        finally:
            await vm.kill()
            os.close(spec.tap_fd)
        shutil.move(spec.disk, self._root / "disk.qcow2")

    def _spec(self, name: str) -> VmSpec:
        directory = self._root / name
        directory.mkdir(mode=0o711)
        return VmSpec(
            sandbox_id=f"bench-{name}",
            directory=directory,
            vcpus=1,
            memory_mb=self._memory_mb,
            kernel=self._image.kernel,
            initramfs=self._image.initramfs,
            base=self._image.rootfs,
            disk=directory / "disk.qcow2",
            disk_format="qcow2",
            tap_fd=open_tap(TAP),
            mac=GUEST_MAC,
            uid=UNPRIVILEGED,
            gid=UNPRIVILEGED,
        )


@asynccontextmanager
async def _linked():
    async with trio.open_nursery() as nursery:
        guest = GuestLink(GUEST_ADDRESS)
        nursery.start_soon(guest.run)
        await guest.wait_connected(trio.current_time() + SECONDS)
        yield guest
        nursery.cancel_scope.cancel()


def _steps(marks: dict[str, float]):
    """When each step began, its name, and when it ended."""
    return zip(marks.values(), list(marks.items())[1:], strict=False)


async def _run(guest: GuestLink, command: tuple[str, ...]) -> None:
    answer = await guest.call("exec", {"cmd": command[0], "args": list(command[1:])}, timeout=SECONDS)
    if answer.get("exit_code"):
        sys.exit(f"{command} in QEMU's own guest: {answer}")
