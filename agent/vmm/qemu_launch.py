"""Starting a QEMU process: what it inherits, who it runs as, what is preloaded into it."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.vmm.ownership import give
from agent.vmm.process import WatchedProcess, spawn
from agent.vmm.qemu_command import Accelerator, Inherited, qemu_command
from agent.vmm.qemu_control import CONTROL_SOCKET
from agent.vmm.qemu_vm import EVENTS_SOCKET
from agent.vmm.vmm_log import VmmLog

if TYPE_CHECKING:
    from agent.vmm.driver import VmSpec

USERFAULTFD = Path("/dev/userfaultfd")

PRELOAD_PROGRAM = "env"
"""Of coreutils. It sets the variables for QEMU alone: `prlimit`, which is started first, gets no library of ours."""

LISTEN_BACKLOG = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """How QEMUs are started on this machine. `shim`: the preloaded library (agent.vmm.shim), None if there is none."""

    binary: Path
    accelerator: Accelerator
    groups: tuple[int, ...] = ()
    shim: Path | None = None

    def start(self, spec: VmSpec, page_socket: Path | None = None) -> tuple[WatchedProcess, VmmLog]:
        """Start QEMU; blocks. With `page_socket` it waits for a saved state and has its memory from there.

        It may die at once, or never answer: that is seen by who waits for it. Raises OSError.
        """
        with ExitStack() as stack:
            control, events = (_listen(stack, spec.directory, name) for name in (CONTROL_SOCKET, EVENTS_SOCKET))
            chain = tuple(_open(stack, path) for path in (spec.base, *spec.layers) if path is not None)
            device = None if self.shim is None else _open_userfaultfd(stack, required=page_socket is not None)
            output = VmmLog.create(spec.directory)
            command = qemu_command(
                spec,
                binary=self.binary,
                accelerator=self.accelerator,
                inherited=Inherited(control.fileno(), events.fileno(), chain),
                restored=page_socket is not None,
            )
            give(spec.disk, spec.uid, spec.gid)
            watched = spawn(
                (*self._preload(spec, device, page_socket), *command),
                directory=spec.directory,
                uid=spec.uid,
                gid=spec.gid,
                groups=self.groups,
                output=output.fileno(),
                descriptors=(
                    *(control.fileno(), events.fileno(), spec.tap_fd, *chain),
                    *(() if device is None else (device,)),
                ),
                network_namespace=spec.network_namespace,
            )
        return watched, output

    def _preload(self, spec: VmSpec, device: int | None, page_socket: Path | None) -> tuple[str, ...]:
        if self.shim is None or device is None:
            return ()
        socket_setting = () if page_socket is None else (f"CAPSULE_PAGES_SOCKET={page_socket}",)
        return (
            PRELOAD_PROGRAM,
            f"LD_PRELOAD={self.shim}",
            f"CAPSULE_PAGES_DEVICE={device}",
            f"CAPSULE_PAGES_MEMORY={spec.memory_mb << 20}",
            *socket_setting,
        )


def _listen(stack: ExitStack, directory: Path, name: str) -> socket.socket:
    """Listen for QEMU, before it runs: a client can connect at once and has nothing to wait or look for."""
    parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, parent)
    (directory / name).unlink(missing_ok=True)  # of an earlier boot
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    listener.bind(f"/proc/self/fd/{parent}/{name}")
    listener.listen(LISTEN_BACKLOG)
    return listener


def _open(stack: ExitStack, path: Path) -> int:
    """Open a part of the disk's chain for a user who may not. Read-only: so is every copy of the descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    stack.callback(os.close, descriptor)
    return descriptor


def _open_userfaultfd(stack: ExitStack, *, required: bool) -> int | None:
    """Open the device for a user who may not; None on a machine without, where VMs can be started but not restored."""
    try:
        descriptor = os.open(USERFAULTFD, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        if required:
            raise
        return None
    stack.callback(os.close, descriptor)
    return descriptor
