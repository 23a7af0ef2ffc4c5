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

TCG_CPU = "max,-erms"
"""All that TCG can do but "enhanced rep movsb": a guest's kernel that sees it copies and clears memory by that one
instruction, which TCG executes a byte at a time."""

DISK_NODE = "disk-0"
"""The block node the guest's disk starts with; a pivot puts the next number on top. The file below a node has the
node's name with FILE_SUFFIX."""

FILE_SUFFIX = "-file"

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What executes the guest's instructions. `tsc_khz`: speed of the host's time stamp counter, for TCG."""

    kind: Literal["kvm", "tcg"]
    tsc_khz: int | None = None

    def options(self) -> str:
        return "kvm" if self.kind == "kvm" else f"tcg,tb-size={TRANSLATION_CACHE_MB}"

    def cpu(self) -> str:
        return "host" if self.kind == "kvm" else TCG_CPU

    def kernel_arguments(self) -> tuple[str, ...]:
        if self.tsc_khz is None:
            return ()  # kvm-clock tells the guest
        # Calibration against the timer chip fails on a busy host: without the first the boot spins for ever, without
        # the second the clock falls back to jiffies for life, in every clone of a snapshot too. The third skips a check
        # of the timer interrupt that fails for the same reason.
        return (f"tsc_early_khz={self.tsc_khz}", "tsc=reliable", "no_timer_check")


@dataclass(frozen=True, slots=True)
class Inherited:
    """Numbers of the descriptors a QEMU inherits. `control` and `events` are listening unix sockets; `chain` is what
    lies below its disk, read-only: the base image, then the layers, lowest first."""

    control: int
    events: int
    chain: tuple[int, ...] = ()


def qemu_command(
    spec: VmSpec, *, binary: Path, accelerator: Accelerator, inherited: Inherited, restored: bool = False
) -> tuple[str, ...]:
    """Build the command line. `restored`: wait for a saved state instead of starting the kernel."""
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
        *_monitor("control", inherited.control),
        *_monitor("events", inherited.events),
        *(("-incoming", "defer", "-S") if restored else _kernel(spec, accelerator)),
        *_disk(spec, inherited.chain),
        *("-netdev", f"tap,id=net,fd={spec.tap_fd}"),
        *("-device", _json({"driver": "virtio-net-device", "netdev": "net", "mac": spec.mac})),
    )


def overlay_node(overlay: Path, name: str) -> dict[str, object]:
    """Describe a qcow2 overlay without anything below it, as a block node called `name`."""
    return {**_image("qcow2", overlay, name), "backing": None}


def _kernel(spec: VmSpec, accelerator: Accelerator) -> tuple[str, ...]:
    return (
        *("-kernel", str(spec.kernel)),
        *("-initrd", str(spec.initramfs)),
        *("-append", " ".join(_kernel_arguments(spec, accelerator))),
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


def _disk(spec: VmSpec, chain: tuple[int, ...]) -> tuple[str, ...]:
    node = _image(spec.disk_format, spec.disk, DISK_NODE)
    if chain:
        node["backing"] = _chain(len(chain))
    descriptors = [("-add-fd", f"fd={descriptor},set={number}") for number, descriptor in enumerate(chain)]
    # A full host disk is an I/O error in the guest. QEMU's own default stops the VM and waits for an operator.
    device = {"driver": "virtio-blk-device", "drive": DISK_NODE, "werror": "report", "rerror": "report"}
    return (*(word for option in descriptors for word in option), "-blockdev", _json(node), "-device", _json(device))


def _image(driver: str, path: Path, name: str) -> dict[str, object]:
    file = {
        "driver": "file",
        "node-name": name + FILE_SUFFIX,
        "filename": str(path),
        "aio": "threads",
        "discard": "unmap",
    }
    return {"driver": driver, "node-name": name, "discard": "unmap", "file": file}


def _chain(length: int) -> dict[str, object]:
    """Describe base image and layers, each on the one before. Not locked: any number of VMs share them."""
    node: dict[str, object] = {}
    for number in range(length):
        file = {"driver": "file", "filename": f"/dev/fdset/{number}", "locking": "off", "read-only": True}
        node = {
            "driver": "qcow2" if number else "raw",
            "node-name": f"layer-{number}" if number else "base",
            "read-only": True,
            "file": file,
            **({"backing": node} if number else {}),
        }
    return node


def _json(options: object) -> str:
    # As JSON a path needs no escaping; in QEMU's key=value form a comma in one would start a new option.
    return msgspec.json.encode(options).decode()
