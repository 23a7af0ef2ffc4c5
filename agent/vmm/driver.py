"""What the agent asks of a virtual machine monitor: the interface every driver keeps and its failures.

The VMM process belongs to nobody: it outlives the agent that started it and is found again by its identity. No
exit of ours, and no cancellation, ends a VM; only `Vm.kill` and `VmDriver.kill_process` do. (A boot that is
cancelled half way kills what it had started.)

Pausing, saving and restoring join `Vm` and `VmDriver` with the snapshots.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

MAX_CONSOLE_BYTES = 64 * 1024
"""How much of a guest's console is kept, in memory: plenty for a kernel's last words, nothing for a flood."""

SANDBOX_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class VmmError(Exception):
    """Base of everything a VMM driver raises; never raised itself."""


class VmmUnavailable(VmmError):  # noqa: N818 - says what happened
    """VMs cannot run on this machine with this driver; the message says what is missing."""


class VmStartFailed(VmmError):  # noqa: N818 - says what happened
    """The VMM did not come up; the message ends with the VMM's own last words. Nothing of it is left running."""


class VmWillNotDie(VmmError):  # noqa: N818 - says what happened
    """SIGKILL was sent and the process is still there after the bound: it hangs inside the kernel.

    Its disk and tap are still in use. Try again later; do not remove them yet.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """One VM to boot.

    `directory` is private to this VM, absolute, and exists; the VMM keeps its control sockets and its log there.
    `kernel` and `initramfs` must be readable by `uid`; `disk` is given to `uid` by the boot. Every directory on
    the way to them needs search permission for others. `tap_fd` stays the caller's, who closes it after the boot
    or lets it go with the slot. `kernel_arguments` follow those of the driver, which names the console and the
    root device (`root=/dev/vda`). `network_namespace`: where the VMM itself lives; it needs no network but its tap, so
    one that was taken over by its guest reaches nothing from there.
    """

    sandbox_id: str
    directory: Path
    vcpus: int
    memory_mb: int
    kernel: Path
    initramfs: Path
    disk: Path
    disk_format: Literal["qcow2", "raw"]
    tap_fd: int
    mac: str
    uid: int
    gid: int
    kernel_arguments: tuple[str, ...] = ()
    network_namespace: Path | None = None

    def __post_init__(self) -> None:
        if not SANDBOX_ID.fullmatch(self.sandbox_id):
            raise ValueError(f"not an id that can name a control group: {self.sandbox_id!r}")
        for path in (self.directory, self.kernel, self.initramfs, self.disk):
            if not path.is_absolute():
                # An overlay records the name of its backing file as it was given: a relative one breaks later.
                raise ValueError(f"a VM's paths must be absolute: {path}")
        if self.vcpus < 1 or self.memory_mb < 1:
            raise ValueError("a VM needs at least one vCPU and one MiB")
        if any(not argument.isprintable() or " " in argument for argument in self.kernel_arguments):
            raise ValueError("a kernel argument must be printable and without spaces")


@dataclass(frozen=True, slots=True)
class VmProcess:
    """Identity of a VMM process: a pid alone would name a stranger once it has been used again.

    `start_time` is in clock ticks since the machine's boot (field 22 of /proc/PID/stat).
    """

    pid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class VmStatistics:
    """What one VM costs its host at this moment: resident bytes of the VMM (guest memory included), CPU seconds."""

    resident_bytes: int
    cpu_seconds: float


class Vm(Protocol):
    """A running VM."""

    @property
    def process(self) -> VmProcess: ...

    async def wait_exit(self) -> str:
        """Wait until the VM is over and say in words why; returns at once if it is.

        A guest that powers off, reboots or panics is over too: its VMM is ended here. Any number of tasks may wait.
        Afterwards call `kill` to release what the host still holds for the VM.
        """
        ...

    async def kill(self) -> None:
        """End the VM now and wait until its process is gone and reaped; harmless if it has gone already.

        Not interrupted by cancellation, bounded in time. Raises VmWillNotDie.
        """
        ...

    async def console_tail(self) -> str:
        """Return the last of the guest's console, at most MAX_CONSOLE_BYTES, control characters removed.

        Never raises: what cannot be had is left out. The text is the guest's: it may say anything.
        """
        ...

    def statistics(self) -> VmStatistics | None:
        """Return the cost so far, None once the process has gone."""
        ...


class VmDriver(Protocol):
    """Starts VMs and finds those that an earlier agent started."""

    @property
    def name(self) -> str:
        """Which VMM and what executes the guest's instructions, e.g. "qemu-tcg"."""
        ...

    async def boot(self, spec: VmSpec) -> Vm:
        """Start a VM; it executes its kernel when this returns. Raises VmStartFailed.

        Cancelled, it leaves nothing running.
        """
        ...

    async def adopt(self, spec: VmSpec, process: VmProcess) -> Vm | None:
        """Take over a VM that another agent started; None if that process has gone or is not this VM."""
        ...

    def find_orphans(self, root: Path) -> dict[Path, VmProcess]:
        """Return every VMM process whose private directory lies under `root`, by directory.

        Reads the process table, not our records: it also finds what an agent started and did not live to write down.
        """
        ...

    async def kill_process(self, process: VmProcess) -> None:
        """End a VMM process of which only the identity is known; harmless if it has gone. Raises VmWillNotDie."""
        ...

    async def remove_leftovers(self) -> None:
        """Remove what dead VMs left in the kernel (empty control groups). For the start of the agent."""
        ...
