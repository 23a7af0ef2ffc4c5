"""The QEMU driver: `microvm` machines under KVM where it really works, under TCG elsewhere."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from agent.vmm.cgroup import CgroupTree
from agent.vmm.driver import VmDriver, VmmUnavailable, VmProcess, VmSpec, VmStartFailed, VmState, VmWillNotDie
from agent.vmm.kvm import kvm_group, probe_kvm
from agent.vmm.process import Candidate, WatchedProcess, inspect, processes, processes_of, users_of
from agent.vmm.qemu_command import NAME_PREFIX, Accelerator
from agent.vmm.qemu_launch import USERFAULTFD, Launcher
from agent.vmm.qemu_vm import KILL_TIMEOUT, QemuVm, end
from agent.vmm.shim.build import ShimError, find_shim
from agent.vmm.tsc import tsc_khz
from agent.vmm.vmm_log import VmmLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Container

log = structlog.get_logger()

PROGRAM = "qemu-system-x86_64"
SHIMS = Path("/var/lib/capsule/vmm")
"""Where the preloaded library is, or is built when it is first needed."""

BOOT_TIMEOUT = 60.0
"""Seconds until QEMU answers. It takes 0.1 s; a machine that starts a hundred at once may take a while."""

RESTORE_TIMEOUT = 30.0
"""Seconds until a saved VM is there again. It takes 0.1 s; the pages of memory that it needs may have to be read."""

VERSION_TIMEOUT = 20.0

MAX_SPAWNS = 4
"""QEMUs being forked at once; more of them would only queue for the processors."""

OVERHEAD_MB = 384
"""Memory limit beyond the guest's own: QEMU, its code cache, I/O buffers. Measured: 60 to 220 MB at worst."""

MAX_TASKS = 256
"""Threads of one QEMU: a few, one per vCPU, and up to 64 for disk I/O."""


class QemuDriver(VmDriver):
    """Starts QEMUs, each as an unprivileged user under QEMU's system call filter, in a control group of its own."""

    def __init__(self, launcher: Launcher, *, version: str, cgroups: CgroupTree) -> None:
        self._launcher = launcher
        self._version = version
        self._cgroups = cgroups
        self._spawns = trio.CapacityLimiter(MAX_SPAWNS)

    @property
    def name(self) -> str:
        """See VmDriver."""
        return f"qemu-{self._launcher.accelerator.kind}"

    def version(self) -> str:
        """See VmDriver."""
        return f"{self.name} {self._version}"

    async def boot(self, spec: VmSpec) -> QemuVm:
        """See VmDriver."""
        async with self._started(spec, None) as vm:
            with trio.move_on_after(BOOT_TIMEOUT):
                await vm.wait_ready()
                if self._launcher.shim is not None and not await vm.tracks_writes():
                    log.warning("written_pages_not_tracked", sandbox_id=spec.sandbox_id, reason=vm.last_words())
                return vm
            raise VmStartFailed(f"QEMU did not answer within {BOOT_TIMEOUT:g} s{vm.last_words()}")

    async def restore(self, spec: VmSpec, saved: VmState) -> QemuVm:
        """See VmDriver."""
        if self._launcher.shim is None:
            raise VmStartFailed(f"VMs cannot be restored on this machine: {USERFAULTFD} or a C compiler is missing")
        try:
            state = os.open(saved.state, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise VmStartFailed(f"the saved state cannot be read: {error}") from error
        try:
            async with self._started(spec, saved.page_socket) as vm:
                with trio.move_on_after(RESTORE_TIMEOUT):
                    await vm.wait_ready(state)
                    return vm
                raise VmStartFailed(
                    f"QEMU did not restore the VM within {RESTORE_TIMEOUT:g} s: has nobody brought the memory "
                    f"it asked for?{vm.last_words()}"
                )
        finally:
            os.close(state)

    async def adopt(self, spec: VmSpec, process: VmProcess) -> QemuVm | None:
        """See VmDriver."""
        watched = WatchedProcess.open(process)
        if watched is None:
            return None
        found = inspect(process.pid)
        if (
            found is None
            or found.identity != process
            or _sandbox_of(found) != spec.sandbox_id
            or found.directory != spec.directory.resolve()
        ):
            return None
        return QemuVm(spec, watched, self._cgroups, VmmLog.open(spec.directory))

    def find_orphans(self, root: Path) -> dict[Path, VmProcess]:
        """See VmDriver."""
        resolved = root.resolve()
        return {
            root / found.directory.relative_to(resolved): found.identity
            for found in processes()
            if _sandbox_of(found) is not None and found.directory.is_relative_to(resolved)
        }

    async def kill_process(self, process: VmProcess) -> None:
        """See VmDriver."""
        watched = WatchedProcess.open(process)
        if watched is None:
            return
        if 0 in users_of(process.pid):
            raise VmWillNotDie(f"process {process.pid} runs as root, so it is no VM; it is left alone")
        await end(watched, self._cgroups, self._cgroups.group_of(process.pid))

    async def end_users(self, users: Container[int], sandboxes: Container[str]) -> set[int]:
        """See VmDriver. Whose a process is, is told by its control group."""
        for _user, process in await trio.to_thread.run_sync(_list_processes, users):
            if self._cgroups.group_of(process.pid) in sandboxes:
                try:
                    await self.kill_process(process)
                except VmWillNotDie as error:
                    log.warning("hidden_vm_not_killed", pid=process.pid, error=str(error))
                else:
                    log.warning("hidden_vm_killed", pid=process.pid)
        return {user for user, _process in await trio.to_thread.run_sync(_list_processes, users)}

    async def remove_leftovers(self) -> None:
        """See VmDriver."""
        await trio.to_thread.run_sync(self._cgroups.remove_empty)

    @asynccontextmanager
    async def _started(self, spec: VmSpec, page_socket: Path | None) -> AsyncIterator[QemuVm]:
        """Start a QEMU; if the block fails or is cancelled, nothing of it is left."""
        vm = await trio.to_thread.run_sync(self._spawn, spec, page_socket, limiter=self._spawns)
        try:
            yield vm
        except BaseException:
            with trio.move_on_after(2 * KILL_TIMEOUT, shield=True):
                await vm.kill()
            raise

    def _spawn(self, spec: VmSpec, page_socket: Path | None) -> QemuVm:
        """Start QEMU in its control group; blocks."""
        try:
            watched, output = self._launcher.start(spec, page_socket)
        except OSError as error:
            raise VmStartFailed(f"QEMU could not be started: {error}") from error
        self._cgroups.add(
            spec.sandbox_id,
            watched.identity.pid,
            memory_bytes=(spec.memory_mb + OVERHEAD_MB) << 20,
            processes=MAX_TASKS,
        )
        return QemuVm(spec, watched, self._cgroups, output)


async def detect_qemu(cgroup_parent: str = "capsule", shims: Path = SHIMS) -> QemuDriver:
    """Return the driver for this machine: with KVM only if it runs a guest. Raises VmmUnavailable.

    `shims`: a directory that every VM's user can reach, for the preloaded library.
    """
    binary = shutil.which(PROGRAM)
    if binary is None:
        raise VmmUnavailable(f"{PROGRAM} is not installed; run: apt-get install qemu-system-x86")
    accelerator, groups = await _choose_accelerator()
    shim = await trio.to_thread.run_sync(_choose_shim, shims)
    launcher = Launcher(binary=Path(binary), accelerator=accelerator, groups=groups, shim=shim)
    return QemuDriver(launcher, version=await _ask_version(binary), cgroups=CgroupTree.detect(cgroup_parent))


async def _ask_version(binary: str) -> str:
    with trio.move_on_after(VERSION_TIMEOUT):
        done = await trio.run_process([binary, "-version"], capture_stdout=True, check=False)
        if found := re.search(rb"version (\d+(?:\.\d+)+)", done.stdout):
            return found[1].decode()
    raise VmmUnavailable(f"{binary} does not tell its version")


def _choose_shim(directory: Path) -> Path | None:
    """Find what VMs can be restored with; None where they can only be booted."""
    if not USERFAULTFD.exists():
        log.warning("vms_not_restorable", reason=f"{USERFAULTFD} is missing: Linux 6.1 or later is needed")
        return None
    try:
        return find_shim(directory)
    except ShimError as error:
        log.warning("vms_not_restorable", reason=str(error))
        return None


async def _choose_accelerator() -> tuple[Accelerator, tuple[int, ...]]:
    answer = await probe_kvm()
    if answer.usable:
        try:
            group = kvm_group()
        except PermissionError as error:
            log.warning("kvm_not_for_vms", reason=str(error))
        else:
            return Accelerator("kvm"), () if group is None else (group,)
    log.info("kvm_not_used", reason=answer.reason)
    return Accelerator("tcg", tsc_khz=await trio.to_thread.run_sync(tsc_khz)), ()


def _list_processes(users: Container[int]) -> list[tuple[int, VmProcess]]:
    return list(processes_of(users))


def _sandbox_of(found: Candidate) -> str | None:
    """Return the sandbox a process says it is the VM of, None if it does not look like a QEMU of ours.

    A guest that has taken its VMM over can have it look like anything: good for finding VMs, not for missing them.
    """
    if not found.program.startswith("qemu-system"):
        return None
    for option, value in pairwise(found.arguments):
        if option == "-name" and value.startswith(NAME_PREFIX):
            return value.removeprefix(NAME_PREFIX)
    return None
