"""The QEMU command line of a VM: pure, so that a test can read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

from agent.vmm.driver import MAX_CONSOLE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from agent.vmm.driver import VmSpec

NAME_PREFIX = "capsule-"
"""How a QEMU of ours is told from somebody else's: `-name capsule-<sandbox id>` on its command line."""

CONSOLE = "console"
"""Id of the ring buffer behind the guest's serial console."""

TRANSLATION_CACHE_MB = 32
"""Code cache of TCG. The default of 1 GiB lets a busy guest cost its host hundreds of MiB; below 16 it thrashes."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What executes the guest's instructions. `tsc_khz`: speed of the host's time stamp counter, for TCG."""

    kind: Literal["kvm", "tcg"]
    tsc_khz: int | None = None

    def options(self) -> str:
        return "kvm" if self.kind == "kvm" else f"tcg,tb-size={TRANSLATION_CACHE_MB}"

    def cpu(self) -> str:
        return "host" if self.kind == "kvm" else "max"

    def kernel_arguments(self) -> tuple[str, ...]:
        if self.tsc_khz is None:
            return ()  # kvm-clock tells the guest
        # Calibration against the timer chip fails on a busy host: without the first the boot spins for ever, without
        # the second the clock falls back to jiffies for life, in every clone of a snapshot too. The third skips a check
        # of the timer interrupt that fails for the same reason.
        return (f"tsc_early_khz={self.tsc_khz}", "tsc=reliable", "no_timer_check")


def qemu_command(
    spec: VmSpec, *, binary: Path, accelerator: Accelerator, control_fd: int, events_fd: int
) -> tuple[str, ...]:
    """Build the command line. `control_fd` and `events_fd` are listening unix sockets the process inherits."""
    size = f"{spec.memory_mb}M"
    return (
        str(binary),
        *("-name", f"{NAME_PREFIX}{spec.sandbox_id}"),
        # The guest's memory has no name: nothing is left behind, and /proc/PID/fd still reaches it.
        *("-machine", "microvm,memory-backend=memory,dump-guest-core=off"),
        *("-object", f"memory-backend-memfd,id=memory,size={size},share=on"),
        *("-accel", accelerator.options()),
        *("-cpu", accelerator.cpu()),
        *("-smp", str(spec.vcpus)),
        *("-m", size),
        "-nodefaults",
        "-no-user-config",
        *("-display", "none"),
        # A guest that powers off, reboots or panics stops with its console still readable, and we end it.
        *("-action", "reboot=shutdown,shutdown=pause"),
        *("-sandbox", SANDBOX),
        *("-chardev", f"ringbuf,id={CONSOLE},size={MAX_CONSOLE_BYTES}"),
        *("-serial", f"chardev:{CONSOLE}"),
        *_monitor("control", control_fd),
        *_monitor("events", events_fd),
        *("-kernel", str(spec.kernel)),
        *("-initrd", str(spec.initramfs)),
        *("-append", " ".join(_kernel_arguments(spec, accelerator))),
        *_disk(spec),
        *("-netdev", f"tap,id=net,fd={spec.tap_fd}"),
        *("-device", _json({"driver": "virtio-net-device", "netdev": "net", "mac": spec.mac})),
    )


def _kernel_arguments(spec: VmSpec, accelerator: Accelerator) -> tuple[str, ...]:
    return (
        *("console=ttyS0", "quiet", "reboot=t", "panic=-1", "random.trust_cpu=on", "root=/dev/vda"),
        *accelerator.kernel_arguments(),
        *spec.kernel_arguments,
    )


def _monitor(name: str, descriptor: int) -> tuple[str, ...]:
    chardev = f"socket,id={name},fd={descriptor},server=on,wait=off"
    return ("-chardev", chardev, "-mon", f"chardev={name},mode=control")


def _disk(spec: VmSpec) -> tuple[str, ...]:
    file = {"driver": "file", "filename": str(spec.disk), "aio": "threads", "discard": "unmap"}
    node = {"driver": spec.disk_format, "node-name": "disk", "discard": "unmap", "file": file}
    # A full host disk is an I/O error in the guest. QEMU's own default stops the VM and waits for an operator.
    device = {"driver": "virtio-blk-device", "drive": "disk", "werror": "report", "rerror": "report"}
    return ("-blockdev", _json(node), "-device", _json(device))


def _json(options: object) -> str:
    # As JSON a path needs no escaping; in QEMU's key=value form a comma in one would start a new option.
    return msgspec.json.encode(options).decode()
