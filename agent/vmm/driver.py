"""What the agent asks of a virtual machine monitor: the interface every driver keeps and its failures.

The VMM process belongs to nobody: it outlives the agent that started it and is found again by its identity. No
exit of ours, and no cancellation, ends a VM; only `Vm.kill` and `VmDriver.kill_process` do. (A boot that is
cancelled half way kills what it had started; so does a restore.)

A paused VM is one whose vCPUs stand still: its process lives, and so does its memory. What a snapshot needs of it is
taken in this order: `pause`, `pivot_disk` if it shall go on running, `save_state`, its memory (`memory`), `resume`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Container

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


class VmGone(VmmError):  # noqa: N818 - says what happened
    """The VM has ended, or its guest has; `Vm.wait_exit` says why."""


class VmCommandFailed(VmmError):  # noqa: N818 - says what happened
    """A living VM refused a command, or did not answer in time. Then the command may still take effect later:
    `Vm.resume` and `Vm.disk_file` bring certainty."""


class VmStateFailed(VmmError):  # noqa: N818 - says what happened
    """The device state could not be saved. No file is left; the VM is paused as before and can be resumed."""


class VmDiskFull(VmStateFailed):
    """The device state could not be saved because the host's disk is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """One VM to boot or to restore.

       `directory` is private to this VM, absolute, and exists; the VMM keeps its control sockets and its log there.
       `kernel` and `initramfs` must be readable by `uid`; `disk` is given to `uid` by the boot. Every directory on
       the way to them needs search permission for others.

       The guest's disk is `base` (raw), `layers` (qcow2, lowest first) on it and `disk` on top; only `disk` is written.
    The chain is exactly this, whatever the files themselves name as backing: a hostile VMM may have rewritten its
    own. `base` and `layers` are opened by the agent and need not be readable by `uid`. Without `base` the disk
    stands alone, or on what its file names.

    `tap_fd` stays the caller's, who closes it after the boot or lets it go with the slot. `kernel_arguments` follow
    those of the driver, which names the console and the root device (`root=/dev/vda`). `network_namespace`: where
    the VMM itself lives; it needs no network but its tap, so one that was taken over by its guest reaches nothing
    from there.
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
    base: Path | None = None
    layers: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not SANDBOX_ID.fullmatch(self.sandbox_id):
            raise ValueError(f"not an id that can name a control group: {self.sandbox_id!r}")
        chain = (*self.layers, *(() if self.base is None else (self.base,)))
        for path in (self.directory, self.kernel, self.initramfs, self.disk, *chain):
            if not path.is_absolute():
                # An overlay records the name of its backing file as it was given: a relative one breaks later.
                raise ValueError(f"a VM's paths must be absolute: {path}")
        if self.layers and self.base is None:
            raise ValueError("layers need a base image below them")
        if chain and self.disk_format != "qcow2":
            raise ValueError("only a qcow2 disk can stand on others")
        if self.vcpus < 1 or self.memory_mb < 1:
            raise ValueError("a VM needs at least one vCPU and one MiB")
        if any(not argument.isprintable() or " " in argument for argument in self.kernel_arguments):
            raise ValueError("a kernel argument must be printable and without spaces")


@dataclass(frozen=True, slots=True)
class VmState:
    """What a VM is restored from, beside its disk.

    `state`: the file that `Vm.save_state` wrote. `page_socket`: where somebody listens who brings the guest's memory,
    page by page; the VMM connects to it as `VmSpec.uid` and hands its userfaultfd over, with Firecracker's handshake.
    """

    state: Path
    page_socket: Path


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """The memory of one guest: `size` bytes, mapped at `address` in process `pid`.

    `fd` is a read-only descriptor of the memory file, the receiver's to close. Never map it: a read fault on a hole
    puts a page of zeros there, and whoever was to bring the page is never asked. pread, sendfile and SEEK_DATA are
    safe.
    """

    pid: int
    address: int
    size: int
    fd: int


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

    async def pause(self) -> None:
        """Stop the vCPUs and write out what the disk still holds in memory; harmless if they stand already.

        Raises VmGone, VmCommandFailed.
        """
        ...

    async def resume(self) -> None:
        """Let the vCPUs go on, after `pause`, `save_state` or a restore; harmless if they run.

        Raises VmGone, VmCommandFailed.
        """
        ...

    async def paused(self) -> bool:
        """Tell whether the vCPUs stand still. Raises VmGone, VmCommandFailed."""
        ...

    async def save_state(self, target: Path, *, sync: bool = True) -> None:
        """Write the state of CPUs and devices, without the memory, to a new file; `sync`: and to the disk.

        The VM must be paused and stays so. Once per pause: only after `resume` can it be saved again. Cancelled or
        failed, it leaves no file. Raises VmGone, VmStateFailed, VmDiskFull.
        """
        ...

    async def pivot_disk(self, overlay: Path) -> None:
        """From now on write to `overlay`, an empty qcow2 file on top of what the disk was; that is read only from here.

        The caller has created `overlay` with the disk's size; it is given to the VM's user. The VM may be paused or
        running, but not between `save_state` and `resume`. Raises VmGone, VmCommandFailed: then the disk is as before,
        or `disk_file` says otherwise.
        """
        ...

    async def disk_file(self) -> Path:
        """Return the file the VM writes to now. Raises VmGone, VmCommandFailed.

        It is the VMM that says it: compare it with the names that are possible.
        """
        ...

    def memory(self) -> GuestMemory:
        """Find the guest's memory. Reads /proc: call it in a thread. Raises VmGone, VmCommandFailed."""
        ...


class VmDriver(Protocol):
    """Starts VMs and finds those that an earlier agent started."""

    @property
    def name(self) -> str:
        """Which VMM and what executes the guest's instructions, e.g. "qemu-tcg"."""
        ...

    def version(self) -> str:
        """Return the VMM and its version, e.g. "qemu-tcg 7.2.22": saved states are valid for one of them."""
        ...

    async def boot(self, spec: VmSpec) -> Vm:
        """Start a VM; it executes its kernel when this returns. Raises VmStartFailed.

        Cancelled, it leaves nothing running.
        """
        ...

    async def restore(self, spec: VmSpec, saved: VmState) -> Vm:
        """Start a VM where another was saved; it is paused when this returns, and `Vm.resume` sets it going.

        `spec` must be that of the saved VM in vCPUs, memory and the content of the disk; the rest may differ. (Not
        every VMM notices if it is not.)
        `kernel`, `initramfs` and `kernel_arguments` are not used. Any number of VMs may be restored from one state.
        Whoever listens at the page socket must serve page faults from the start. Raises VmStartFailed. Cancelled, it
        leaves nothing running.
        """
        ...

    async def adopt(self, spec: VmSpec, process: VmProcess) -> Vm | None:
        """Take over a VM that another agent started; None if that process has gone or is not this VM."""
        ...

    def find_orphans(self, root: Path) -> dict[Path, VmProcess]:
        """Return every VMM process whose private directory lies under `root`, by directory.

        Reads the process table, not our records: it also finds what an agent started and did not live to write down.
        A VMM that its guest has taken over can hide from it: that one is not found is no sign that it has ended.
        """
        ...

    async def kill_process(self, process: VmProcess) -> None:
        """End a VMM process of which only the identity is known, whatever it looks like; harmless if it has gone.

        Raises VmWillNotDie.
        """
        ...

    async def end_users(self, users: Container[int], sandboxes: Container[str]) -> set[int]:
        """End processes that run as one of `users` for one of `sandboxes`; return the users that still have any.

        For VMMs that hide: their user is what they cannot change. Processes of others are left alone, but their users
        are returned, too: nobody else may become such a user.
        """
        ...

    async def remove_leftovers(self) -> None:
        """Remove what dead VMs left in the kernel (empty control groups). For the start of the agent."""
        ...
