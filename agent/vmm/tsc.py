"""The speed of this machine's time stamp counter, which a guest without KVM has to be told."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import time

from agent.vmm.driver import VmmUnavailable

KVM_CREATE_VM = 0xAE01
KVM_CREATE_VCPU = 0xAE41
KVM_GET_TSC_KHZ = 0xAEA3

READ_COUNTER = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret - a C function of no arguments returning the 64-bit counter."""

MEASURE_SECONDS = 0.02
MEASURE_ROUNDS = 3


def tsc_khz() -> int:
    """Return the counter's speed in kHz. Blocks for up to 0.1 s. Raises VmmUnavailable on a machine without one."""
    if os.uname().machine != "x86_64":
        raise VmmUnavailable(f"VMs need an x86-64 host, this is {os.uname().machine}")
    return _ask_kvm() or _measure()


def _ask_kvm() -> int | None:
    """The kernel knows it exactly, wherever /dev/kvm opens; even where KVM itself is no use."""
    descriptors: list[int] = []
    try:
        descriptors.append(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        descriptors.append(fcntl.ioctl(descriptors[-1], KVM_CREATE_VM, 0))
        descriptors.append(fcntl.ioctl(descriptors[-1], KVM_CREATE_VCPU, 0))
        return fcntl.ioctl(descriptors[-1], KVM_GET_TSC_KHZ) or None
    except OSError:
        return None
    finally:
        for descriptor in reversed(descriptors):
            os.close(descriptor)


def _measure() -> int:
    """Count against the clock; of several rounds the one with the least uncertain ends."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError as error:
        raise VmmUnavailable(
            f"the speed of the time stamp counter is unknown: no /dev/kvm to ask, and measuring it failed: {error}"
        ) from error
    page.write(READ_COUNTER)
    anchor = ctypes.c_char.from_buffer(page)  # keeps the page mapped while the function exists
    counter = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
    return round(min(_round(counter) for _ in range(MEASURE_ROUNDS))[1])


def _round(counter: ctypes._FuncPointer) -> tuple[int, float]:
    """Return (uncertainty in ns, kHz)."""
    before = time.perf_counter_ns()
    first = counter()
    started = time.perf_counter_ns()
    time.sleep(MEASURE_SECONDS)
    ended = time.perf_counter_ns()
    last = counter()
    after = time.perf_counter_ns()
    uncertainty = (started - before) + (after - ended)
    return uncertainty, (last - first) * 1e6 / ((ended + after) / 2 - (before + started) / 2)
