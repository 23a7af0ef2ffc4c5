"""The QEMU driver: `microvm` machines under KVM where it really works, under TCG elsewhere."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import structlog
import trio

from agent.vmm.cgroup import CgroupTree
from agent.vmm.driver import VmDriver, VmmUnavailable, VmProcess, VmSpec, VmStartFailed, VmState, VmWillNotDie
from agent.vmm.kvm import kvm_group, probe_kvm
from agent.vmm.process import Candidate, WatchedProcess, inspect, processes, spawn
from agent.vmm.qemu_command import NAME_PREFIX, Accelerator, qemu_command
from agent.vmm.qemu_vm import CONTROL_SOCKET, EVENTS_SOCKET, KILL_TIMEOUT, QemuVm
from agent.vmm.tsc import tsc_khz
from agent.vmm.vmm_log import VmmLog

log = structlog.get_logger()

PROGRAM = "qemu-system-x86_64"

BOOT_TIMEOUT = 60.0
"""Seconds until QEMU answers. It takes 0.1 s; a machine that starts a hundred at once may take a while."""

MAX_SPAWNS = 4
"""QEMUs being forked at once; more of them would only queue for the processors."""

OVERHEAD_MB = 384
"""Memory limit beyond the guest's own: QEMU, its code cache, I/O buffers. Measured: 60 to 220 MB at worst."""

MAX_TASKS = 256
"""Threads of one QEMU: a few, one per vCPU, and up to 64 for disk I/O."""

LISTEN_BACKLOG = 8


class QemuDriver(VmDriver):
    """Starts QEMUs, each as an unprivileged user under QEMU's system call filter, in a control group of its own."""

    def __init__(
        self, *, binary: Path, accelerator: Accelerator, cgroups: CgroupTree, groups: tuple[int, ...] = ()
    ) -> None:
        self._binary = binary
        self._accelerator = accelerator
        self._cgroups = cgroups
        self._groups = groups
        self._spawns = trio.CapacityLimiter(MAX_SPAWNS)

    @property
    def name(self) -> str:
        """See VmDriver."""
        return f"qemu-{self._accelerator.kind}"

    async def boot(self, spec: VmSpec) -> QemuVm:
        """See VmDriver."""
        vm = await trio.to_thread.run_sync(self._spawn, spec, limiter=self._spawns)
        try:
            with trio.move_on_after(BOOT_TIMEOUT):
                await vm.wait_ready()
                return vm
            raise VmStartFailed(f"QEMU did not answer within {BOOT_TIMEOUT:g} s{vm.last_words()}")  # noqa: TRY301
        except BaseException:
            with trio.move_on_after(2 * KILL_TIMEOUT, shield=True):
                await vm.kill()
            raise

    def version(self) -> str:
        """See VmDriver."""
        return f"{self.name} unknown"

    async def restore(self, spec: VmSpec, saved: VmState) -> QemuVm:
        """See VmDriver."""
        raise NotImplementedError(spec, saved)

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
        return QemuVm(spec.sandbox_id, spec.directory, watched, self._cgroups, VmmLog.open(spec.directory))

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
        found = inspect(process.pid)
        if watched is None or found is None:
            return
        sandbox_id = _sandbox_of(found)
        if sandbox_id is None or found.identity != process:
            raise VmWillNotDie(f"process {process.pid} is not a QEMU of ours; it is left alone")
        await QemuVm(sandbox_id, found.directory, watched, self._cgroups, None).kill()

    async def remove_leftovers(self) -> None:
        """See VmDriver."""
        await trio.to_thread.run_sync(self._cgroups.remove_empty)

    def _spawn(self, spec: VmSpec) -> QemuVm:
        """Start QEMU; blocks. It may die at once, or never answer: that is seen by who waits for it."""
        try:
            with ExitStack() as stack:
                control, events = (_listen(stack, spec.directory, name) for name in (CONTROL_SOCKET, EVENTS_SOCKET))
                output = VmmLog.create(spec.directory)
                command = qemu_command(
                    spec,
                    binary=self._binary,
                    accelerator=self._accelerator,
                    control_fd=control.fileno(),
                    events_fd=events.fileno(),
                )
                os.chown(spec.disk, spec.uid, spec.gid, follow_symlinks=False)
                watched = spawn(
                    command,
                    directory=spec.directory,
                    uid=spec.uid,
                    gid=spec.gid,
                    groups=self._groups,
                    output=output.fileno(),
                    descriptors=(control.fileno(), events.fileno(), spec.tap_fd),
                    network_namespace=spec.network_namespace,
                )
        except OSError as error:
            raise VmStartFailed(f"QEMU could not be started: {error}") from error
        self._cgroups.add(
            spec.sandbox_id,
            watched.identity.pid,
            memory_bytes=(spec.memory_mb + OVERHEAD_MB) << 20,
            processes=MAX_TASKS,
        )
        return QemuVm(spec.sandbox_id, spec.directory, watched, self._cgroups, output)


async def detect_qemu(cgroup_parent: str = "capsule") -> QemuDriver:
    """Return the driver for this machine: with KVM only if it runs a guest. Raises VmmUnavailable."""
    binary = shutil.which(PROGRAM)
    if binary is None:
        raise VmmUnavailable(f"{PROGRAM} is not installed; run: apt-get install qemu-system-x86")
    accelerator, groups = await _choose_accelerator()
    return QemuDriver(
        binary=Path(binary), accelerator=accelerator, cgroups=CgroupTree.detect(cgroup_parent), groups=groups
    )


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


def _listen(stack: ExitStack, directory: Path, name: str) -> socket.socket:
    """Listen for QEMU, before it runs: a client can connect at once and has nothing to wait or look for."""
    parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, parent)
    (directory / name).unlink(missing_ok=True)  # of an earlier boot
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    listener.bind(f"/proc/self/fd/{parent}/{name}")
    listener.listen(LISTEN_BACKLOG)
    return listener


def _sandbox_of(found: Candidate) -> str | None:
    """Return the sandbox a process is the VM of, None if it is not a QEMU of ours."""
    if not found.program.startswith("qemu-system"):
        return None
    for option, value in pairwise(found.arguments):
        if option == "-name" and value.startswith(NAME_PREFIX):
            return value.removeprefix(NAME_PREFIX)
    return None
