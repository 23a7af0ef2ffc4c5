"""A program: run a tiny guest under KVM, print what happened, exit 0 if KVM is of use.

Nested hypervisors exist that let /dev/kvm open but emulate every kernel-mode instruction of a guest, at a microsecond
each, and give up on those they do not know. So the guest executes one such instruction (popcnt) and 20,000 rounds
of a loop, then writes a byte to a port and halts: the byte must come out, and soon.

Stands alone (standard library only), since it runs isolated from everything else.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import time
from contextlib import ExitStack

KVM_API_VERSION = 12
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90
KVM_GET_SUPPORTED_CPUID = 0xC008AE05

KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5

LOOPS = 20_000
LIMIT_SECONDS = 0.010
"""Real hardware needs some 10 us; emulation 34 ms and more."""
TRIES = 5
"""The best counts: on a busy machine any single try may lose its CPU for longer than the limit."""

MEMORY = 2 << 20
CODE_AT = 0x10000
STACK_AT = 0x8000
PML4_AT, PDPT_AT, PD_AT = 0x2000, 0x3000, 0x4000
TSS_AT = 0xFFFBD000
"""Three pages below the BIOS that VT-x wants for itself."""

ANSWER = 0x4B
CODE = (
    b"\xf3\x0f\xb8\xc0"  # popcnt eax, eax
    b"\xb9" + struct.pack("<I", LOOPS) + b"\xff\xc9\x75\xfc"  # mov ecx, LOOPS; 1: dec ecx; jnz 1b
    b"\xb0" + bytes([ANSWER]) + b"\xe6\x10"  # mov al, ANSWER; out 0x10, al
    b"\xf4"  # hlt
)

SEGMENT = "<QIHBBBBBBBBBB"
"""struct kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding."""
SEGMENT_BYTES = 24
CONTROL_AT = 8 * SEGMENT_BYTES + 32
"""Where cr0 stands in struct kvm_sregs: behind eight segments and two descriptor tables."""


class KvmError(Exception):
    """KVM did something a usable one does not; the message says what."""


def main() -> int:
    seconds = LIMIT_SECONDS
    try:
        for _ in range(TRIES):
            with ExitStack() as stack:
                seconds = min(seconds, _run(stack))
    except (KvmError, OSError) as error:
        print(error)  # noqa: T201 - this is how it answers
        return 1
    print(f"{seconds * 1e3:.2f} ms for {LOOPS} loops")  # noqa: T201
    return 0 if seconds < LIMIT_SECONDS else 1


def _run(stack: ExitStack) -> float:
    """Run the guest and return how long it took, in seconds."""

    def owned(descriptor: int) -> int:
        stack.callback(os.close, descriptor)
        return descriptor

    kvm = owned(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    if (version := fcntl.ioctl(kvm, KVM_GET_API_VERSION)) != KVM_API_VERSION:
        raise KvmError(f"KVM speaks version {version}, not {KVM_API_VERSION}")
    machine = owned(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
    # A plain number above 2**31: fcntl.ioctl would refuse it.
    ctypes.CDLL(None).ioctl(machine, ctypes.c_ulong(KVM_SET_TSS_ADDR), ctypes.c_ulong(TSS_AT))
    memory = mmap.mmap(-1, MEMORY)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(machine, KVM_SET_USER_MEMORY_REGION, struct.pack("IIQQQ", 0, 0, 0, MEMORY, address))
    vcpu = owned(fcntl.ioctl(machine, KVM_CREATE_VCPU, 0))
    state = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE))
    identification = bytearray(struct.pack("II", 256, 0) + bytes(40 * 256))
    fcntl.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, identification)
    fcntl.ioctl(vcpu, KVM_SET_CPUID2, identification)
    _load(memory)
    _enter_long_mode(vcpu)
    return _execute(vcpu, state)


def _load(memory: mmap.mmap) -> None:
    """Put the code in place, and page tables that map the first 2 MiB onto themselves."""
    memory[CODE_AT : CODE_AT + len(CODE)] = CODE
    for table, entry in ((PML4_AT, PDPT_AT | 3), (PDPT_AT, PD_AT | 3), (PD_AT, 0x83)):
        memory[table : table + 8] = struct.pack("<Q", entry)


def _enter_long_mode(vcpu: int) -> None:
    registers = bytearray(312)
    fcntl.ioctl(vcpu, KVM_GET_SREGS, registers)
    struct.pack_into(SEGMENT, registers, 0, 0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)  # code
    for index in range(1, 6):
        data = (0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        struct.pack_into(SEGMENT, registers, index * SEGMENT_BYTES, *data)
    apic_base = struct.unpack_from("<Q", registers, CONTROL_AT + 48)[0]
    # cr0 = PG|AM|WP|NE|ET|MP|PE, cr2, cr3, cr4 = PAE, cr8, efer = LMA|LME
    struct.pack_into("<7Q", registers, CONTROL_AT, 0x80050033, 0, PML4_AT, 0x20, 0, 0x500, apic_base)
    fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(registers))
    general = [0] * 18
    general[6], general[16], general[17] = STACK_AT, CODE_AT, 2  # rsp, rip, rflags
    fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("<18Q", *general))


def _execute(vcpu: int, state: mmap.mmap) -> float:
    started = time.perf_counter()
    answered = False
    while True:
        fcntl.ioctl(vcpu, KVM_RUN, 0)
        reason = struct.unpack_from("<I", state, 8)[0]
        if reason == KVM_EXIT_IO and not answered:
            answered = state[struct.unpack_from("<Q", state, 40)[0]] == ANSWER
        elif reason == KVM_EXIT_HLT and answered:
            return time.perf_counter() - started
        else:
            raise KvmError(f"the probe guest stopped with KVM exit reason {reason}")


if __name__ == "__main__":
    sys.exit(main())
