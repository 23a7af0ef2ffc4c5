"""Whether KVM runs guests on this machine; /dev/kvm that opens proves nothing."""

from __future__ import annotations

import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import trio

PROBE = Path(__file__).with_name("kvm_probe.py")

PROBE_TIMEOUT = 10.0
"""Seconds for the program to start and its guest to run: 3 ms of guest, the rest is Python on a busy machine."""


@dataclass(frozen=True, slots=True)
class KvmAnswer:
    """Whether KVM is of use, and why not (or how fast)."""

    usable: bool
    reason: str


async def probe_kvm() -> KvmAnswer:
    """Let a small guest run, in a process of its own: a broken hypervisor can hang or kill who tries it."""
    with trio.move_on_after(PROBE_TIMEOUT):
        finished = await trio.run_process(
            [sys.executable, "-I", "-S", str(PROBE)], capture_stdout=True, stderr=subprocess.DEVNULL, check=False
        )
        reason = finished.stdout.decode(errors="replace").strip() or f"the probe died ({finished.returncode})"
        return KvmAnswer(finished.returncode == 0, reason)
    return KvmAnswer(usable=False, reason=f"the probe guest hung for {PROBE_TIMEOUT:g} s")


def kvm_group(device: Path = Path("/dev/kvm")) -> int | None:
    """Return the group that lets an unprivileged VMM open /dev/kvm, None if anybody may.

    Raises PermissionError if only root may: `chgrp kvm /dev/kvm && chmod 660 /dev/kvm` lets the VMs use it.
    """
    status = device.stat()
    if status.st_mode & stat.S_IROTH and status.st_mode & stat.S_IWOTH:
        return None
    if status.st_mode & stat.S_IRGRP and status.st_mode & stat.S_IWGRP:
        return status.st_gid
    raise PermissionError(f"only root may open {device}; run: chgrp kvm {device} && chmod 660 {device}")
