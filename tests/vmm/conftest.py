"""Drivers under test, and small guests for the real one: a test init instead of a root file system."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from agent.images.cpio import archive, regular
from agent.images.store import ImageStore
from agent.vmm.cgroup import CgroupTree
from agent.vmm.driver import VmSpec, VmState
from agent.vmm.fake import FakeVmDriver
from agent.vmm.process import processes
from agent.vmm.qemu import QemuDriver, detect_qemu
from agent.vmm.qemu_launch import Launcher
from agent.vmm.shim.build import find_shim

IMAGES = Path(os.environ.get("CAPSULE_AGENT_IMAGES", "/var/lib/capsule/images"))

UID = 64321
"""Nobody's, so that nothing but what a VM was given is open to it."""

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000


SECONDS_PER_TEST = 300


@pytest.fixture(autouse=True)
def _bounded():
    """End a test that hangs, whatever it hangs in."""

    def give_up(_signal, _frame):
        raise TimeoutError(f"the test took more than {SECONDS_PER_TEST} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS_PER_TEST)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def open_tap():
    """A tap in a network namespace that nothing but its descriptor holds."""
    descriptors = []

    def make():
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
            return
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"tap0", IFF_TAP | IFF_NO_PI))
        descriptors.append(descriptor)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not descriptors:
        pytest.skip("network namespaces and taps need root")
    return descriptors[0]


UFFDIO_COPY = 0xC028AA03
COPY_WRITE_PROTECTED = 2
COPY_BYTES = 1 << 20


class PageServer:
    """Serves the memory of one restored VM: all of it at once, from an image of the same size.

    `silent`: takes the connection and the userfaultfd, and never serves a page.
    """

    def __init__(self, path, image, *, silent=False):
        self.path = path
        self.handshake = None
        self._image = image
        self._silent = silent
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        os.chown(path, UID, UID)
        self._listener.listen()
        self._connection = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self):
        for end in (self._listener, self._connection):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # wakes the thread
                end.close()
        self._thread.join()

    def _serve(self):
        with contextlib.suppress(OSError):
            self._connection, _ = self._listener.accept()
            text, (faults,), _, _ = socket.recv_fds(self._connection, 4096, 1)
            try:
                self.handshake = json.loads(text)
                if not self._silent:
                    (region,) = self.handshake
                    self._copy(faults, region["base_host_virt_addr"], region["size"])
                self._connection.recv(1)  # until QEMU ends
            finally:
                os.close(faults)

    def _copy(self, faults, address, size):
        content = bytearray(self._image.read_bytes())
        source = ctypes.addressof(ctypes.c_char.from_buffer(content))
        for offset in range(0, size, COPY_BYTES):
            length = min(COPY_BYTES, size - offset)
            request = struct.pack("=QQQQq", address + offset, source + offset, length, COPY_WRITE_PROTECTED, 0)
            fcntl.ioctl(faults, UFFDIO_COPY, bytearray(request))


@dataclass(frozen=True)
class Saved:
    """A saved VM: its state, an image of its memory, and what it counted last."""

    state: Path
    memory: Path
    counted: int


class Bench:
    """A driver with what a test needs around it: fresh specs, a way to crash a VM and to make a boot fail."""

    def __init__(self, driver, root):
        self.driver = driver
        self.root = root
        self.taps = []

    def spec(self, sandbox_id="one", *, mode="idle", **changes):
        directory = self.root / sandbox_id
        directory.mkdir()
        disk = directory / "disk.raw"
        disk.write_bytes(bytes(1 << 20))
        kernel, initramfs = self.boot_files()
        spec = VmSpec(
            sandbox_id=sandbox_id,
            directory=directory,
            vcpus=1,
            memory_mb=96,
            kernel=kernel,
            initramfs=initramfs,
            disk=disk,
            disk_format="raw",
            tap_fd=self.open_tap(),
            mac="02:00:00:00:00:01",
            uid=UID,
            gid=UID,
            kernel_arguments=(f"mode={mode}",),
        )
        return replace(spec, **changes)

    def counting_spec(self, sandbox_id="one", *, mode="count", layers=(), **changes):
        """A guest that counts, on a fresh overlay over a base image that only root may read."""
        base = self.root / "base.raw"
        if not base.exists():
            base.write_bytes(bytes(1 << 20))
            base.chmod(0o400)
        spec = self.spec(sandbox_id, mode=mode)
        disk = self.overlay(spec.directory / "disk.qcow2")
        return replace(spec, disk=disk, disk_format="qcow2", base=base, layers=tuple(layers), **changes)

    async def save(self, vm, name="saved"):
        """Pause a counting VM and save it: state and memory."""
        await vm.pause()
        state, memory = self.root / f"{name}.state", self.root / f"{name}.memory"
        await vm.save_state(state)
        found = vm.memory()
        try:
            copy_sparse(found.fd, found.size, memory)
        finally:
            os.close(found.fd)
        return Saved(state, memory, await self.counted(vm))

    async def restore(self, spec, saved):
        """Restore a VM; it is paused."""
        pages = self.serve_pages(spec, saved)
        return await self.driver.restore(spec, VmState(saved.state, pages))


class FakeBench(Bench):
    def boot_files(self):
        return Path("/kernel"), Path("/initramfs")

    def open_tap(self):
        return -1

    def overlay(self, path):
        path.touch()
        return path

    def serve_pages(self, spec, _saved):
        return spec.directory / "pages.sock"

    def crash(self, vm):
        self.driver.machines[vm.process].die("it crashed")

    def doomed_spec(self):
        self.driver.fail_next_boot("no such kernel")
        return self.spec("doomed")

    async def counted(self, vm):
        """What the guest counted last."""
        return self.driver.machines[vm.process].counter

    async def count(self, vm):
        """Wait until the guest has counted further, and return how far."""
        return self.driver.machines[vm.process].tick()

    async def stands(self, vm):
        """Whether the guest has ceased to count."""
        return await self.count(vm) == await self.count(vm)

    async def close(self):
        pass


class QemuBench(Bench):
    def __init__(self, driver, root, files, cgroups):
        super().__init__(driver, root)
        self.files = files
        self.cgroups = cgroups
        self.servers = []

    def boot_files(self):
        return self.files

    def open_tap(self):
        self.taps.append(open_tap())
        return self.taps[-1]

    def overlay(self, path):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
        return path

    def serve_pages(self, spec, saved, **options):
        self.servers.append(PageServer(spec.directory / "pages.sock", saved.memory, **options))
        return self.servers[-1].path

    def crash(self, vm):
        os.kill(vm.process.pid, 9)

    def doomed_spec(self):
        return self.spec("doomed", kernel=Path("/nonexistent/kernel"))

    async def ticks(self, vm):
        """All that a counting guest has said since it was booted or restored: (tick, what was on the disk)."""
        return parse_ticks(await vm.console_tail())

    async def counted(self, vm):
        console = await vm.console_tail()
        ticks = parse_ticks(console)
        last = ticks[-1][0] if ticks else 0
        cut = console.rpartition("\n")[2]  # it may have been paused in the middle of a line: that tick has been made
        return last + 1 if cut and ticks and f"tick {last + 1} disk {last}".startswith(cut) else last

    async def count(self, vm):
        before = await self.counted(vm)
        for _ in range(1200):
            if (now := await self.counted(vm)) > before:
                return now
            assert vm.statistics() is not None, await vm.wait_exit()
            await trio.sleep(0.05)
        raise AssertionError(f"the guest does not count: {await vm.console_tail()!r}")

    async def stands(self, vm):
        before = await self.counted(vm)
        await trio.sleep(0.3)  # six ticks
        return await self.counted(vm) == before

    async def close(self):
        for process in self.driver.find_orphans(self.root).values():
            await self.driver.kill_process(process)
        await self.driver.remove_leftovers()
        for server in self.servers:
            server.close()
        for tap in self.taps:
            os.close(tap)


def parse_ticks(console):
    """See QemuBench.ticks."""
    return [(int(tick), int(disk)) for tick, disk in re.findall(r"^tick (\d+) disk (\d+)$", console, re.MULTILINE)]


def copy_sparse(source, size, target):
    """Copy what there is of a memory file; never by mapping it."""
    with target.open("wb") as file:
        file.truncate(size)
        offset = 0
        while offset < size:
            try:
                begin = os.lseek(source, offset, os.SEEK_DATA)
            except OSError:  # a hole to the end
                return
            offset = os.lseek(source, begin, os.SEEK_HOLE)
            file.seek(begin)
            while begin < offset:
                chunk = os.pread(source, min(COPY_BYTES, offset - begin), begin)
                file.write(chunk)
                begin += len(chunk)


@pytest.fixture(scope="session")
def boot_files(tmp_path_factory):
    """Kernel and initramfs: the image's, with /init replaced by guest.c. The kernel unpacks both archives in turn."""
    if os.geteuid() != 0:
        pytest.skip("VMs need root (for now: taps, users, control groups)")
    if not IMAGES.is_dir():
        pytest.skip(f"no images in {IMAGES}; build them with: python -m agent.images build")
    if shutil.which("musl-gcc") is None:
        pytest.skip("musl-gcc is not installed (apt-get install musl-tools)")
    image = ImageStore(IMAGES).load("minimal")
    with tempfile.TemporaryDirectory(prefix="capsule-guest-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        init = directory / "init"
        source = Path(__file__).with_name("guest.c")
        subprocess.run(["musl-gcc", "-Os", "-static", "-s", "-o", init, source], check=True)
        initramfs = directory / "initramfs"
        initramfs.write_bytes(image.initramfs.read_bytes() + archive([regular("init", init.read_bytes(), mode=0o755)]))
        initramfs.chmod(0o644)
        yield image.kernel, initramfs


@pytest.fixture(scope="session")
def shim_directory():
    """Where the preloaded library is built. Not tmp_path: a VM's user could not reach what lies in there."""
    with tempfile.TemporaryDirectory(prefix="capsule-shim-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def accelerator(shim_directory):
    """What this machine runs guests with, found out once."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed (apt-get install qemu-system-x86)")
    return trio.run(detect_qemu, "capsule", shim_directory)._launcher.accelerator


@pytest.fixture
def root():
    """Where sandboxes have their directories. Not tmp_path: a VM's user could not reach what lies in there."""
    with tempfile.TemporaryDirectory(prefix="capsule-vmm-") as name:
        Path(name).chmod(0o711)
        yield Path(name)
        # Also after a test that was ended by its time-out, when nothing asynchronous can clean up any more.
        for found in processes():
            if found.directory.is_relative_to(name):
                with contextlib.suppress(ProcessLookupError):  # it is just ending
                    os.kill(found.identity.pid, signal.SIGKILL)


@pytest.fixture
async def qemu(boot_files, accelerator, root, shim_directory):
    cgroups = CgroupTree.detect(f"capsule-test-{os.getpid()}")
    binary = Path(shutil.which("qemu-system-x86_64"))
    launcher = Launcher(binary=binary, accelerator=accelerator, shim=find_shim(shim_directory))
    driver = QemuDriver(launcher, version="0", cgroups=cgroups)
    bench = QemuBench(driver, root, boot_files, cgroups)
    yield bench
    await bench.close()
    if cgroups._parent is not None and cgroups._parent.exists():
        cgroups._parent.rmdir()


@pytest.fixture
def fake(root):
    return FakeBench(FakeVmDriver(), root)


@pytest.fixture(
    params=["fake", pytest.param("qemu", marks=[pytest.mark.vm, pytest.mark.host])],
)
def bench(request):
    """Every driver, each test once with each."""
    return request.getfixturevalue(request.param)
