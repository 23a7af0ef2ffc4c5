"""A program: what a VMM is to the memory modules. Maps a memory file, arms it, and touches it as it is told.

    python -I -S process_with_memory.py MEMFD SOCKET MODES FEATURES WHOLE

MODES are userfaultfd's (1 MISSING, 2 WP; 0: not registered), WHOLE is 1 to write-protect everything once. Sends
the memory's address as JSON together with the userfaultfd, then obeys [operation, offset, length, byte], one at a time,
each answered by one JSON value. Standard library only.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import itertools
import json
import mmap
import os
import socket
import struct
import sys

UFFD_API = 0xAA
USERFAULTFD_IOC_NEW = 0xAA00
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_WRITEPROTECT = 0xC018AA06
UFFDIO_WRITEPROTECT_MODE_WP = 1
MADV_REMOVE = 9
PAGE = 4096

TURNS = itertools.count(1)


def arm(address: int, size: int, modes: int, features: int, *, whole: bool) -> int:
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    uffd = fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    os.close(device)
    fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("<QQQ", UFFD_API, features, 0)))
    fcntl.ioctl(uffd, UFFDIO_REGISTER, bytearray(struct.pack("<QQQQ", address, size, modes, 0)))
    if whole:
        protect = struct.pack("<QQQ", address, size, UFFDIO_WRITEPROTECT_MODE_WP)
        fcntl.ioctl(uffd, UFFDIO_WRITEPROTECT, bytearray(protect))
    return uffd


def write(memory: mmap.mmap, offset: int, length: int, byte: int) -> None:
    memory[offset : offset + length] = bytes([byte]) * length


def read(memory: mmap.mmap, offset: int, length: int, _byte: int) -> list[int]:
    return [memory[at] for at in range(offset, offset + length, PAGE)]


def receive(memory: mmap.mmap, offset: int, length: int, byte: int) -> None:
    """The kernel writes, as it does for a VMM's disks and network."""
    source = os.memfd_create("source")
    os.write(source, bytes([byte]) * length)
    with memoryview(memory) as view:
        os.preadv(source, [view[offset : offset + length]], 0)
    os.close(source)


def remove(memory: mmap.mmap, offset: int, length: int, _byte: int) -> None:
    memory.madvise(MADV_REMOVE, offset, length)


def forget(memory: mmap.mmap, offset: int, length: int, _byte: int) -> None:
    memory.madvise(mmap.MADV_DONTNEED, offset, length)


def fork(memory: mmap.mmap, offset: int, length: int, byte: int) -> None:
    """A child that does nothing; then the parent writes."""
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    write(memory, offset, length, byte)


def fork_and_write(memory: mmap.mmap, offset: int, length: int, byte: int) -> None:
    if (pid := os.fork()) == 0:
        write(memory, offset, length, byte)
        os._exit(0)
    os.waitpid(pid, 0)


def storm(memory: mmap.mmap, offset: int, length: int, turns: int) -> None:
    """Every page `turns` times, each time with a number that it never had."""
    for turn in itertools.islice(TURNS, turns):
        for at in range(offset, offset + length, PAGE):
            memory[at : at + 8] = struct.pack("<Q", turn << 32 | at)


OPERATIONS = {
    operation.__name__: operation for operation in (write, read, receive, remove, forget, fork, fork_and_write, storm)
}


def main() -> None:
    descriptor, control, modes, features, whole = map(int, sys.argv[1:])
    size = os.fstat(descriptor).st_size
    memory = mmap.mmap(descriptor, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    link = socket.socket(fileno=control)
    files = array.array("i", [arm(address, size, modes, features, whole=bool(whole))] if modes else [])
    link.sendmsg([json.dumps(address).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)] if files else [])
    while order := link.recv(4096):
        operation, *where = json.loads(order)
        link.send(json.dumps(OPERATIONS[operation](memory, *where)).encode())


main()
