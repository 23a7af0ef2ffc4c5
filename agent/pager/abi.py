"""The kernel's side of userfaultfd as the pager uses it: requests, structures, events.

After include/uapi/linux/userfaultfd.h and Documentation/admin-guide/mm/userfaultfd.rst; x86-64 and AArch64, where the
numbers are the same. Structures live in buffers that are made once: a request is a `pack_into` and an ioctl.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import socket
import struct
from pathlib import Path
from typing import Any

import trio
from cffi import FFI

PAGE = 4096

UFFDIO_COPY = 0xC028AA03
UFFDIO_WAKE = 0x8010AA02
UFFDIO_WRITEPROTECT = 0xC018AA06
UFFDIO_CONTINUE = 0xC020AA07

COPY_MODE_WP = 2
"""UFFDIO_COPY write-protects what it brings: bringing it is not the guest's writing."""

EVENT_PAGEFAULT = 0x12
EVENT_FORK = 0x13
EVENT_REMAP = 0x14
EVENT_REMOVE = 0x15
EVENT_UNMAP = 0x16

PAGEFAULT_FLAG_WP = 2
PAGEFAULT_FLAG_MINOR = 4

EVENT = struct.Struct("<B7xQQQ")
"""struct uffd_msg: event, then three words: flags and address of a fault, start and end of a removed range."""
_COPY = struct.Struct("<QQQQq")
"""struct uffdio_copy: dst, src, len, mode, copy (out)."""
_RANGE = struct.Struct("<QQ")
_RANGE_MODE = struct.Struct("<QQQ")
_CONTINUE = struct.Struct("<QQQq")
_COPIED = struct.Struct("<q")

_SYS_PIDFD_GETFD = 438
_SYS_KCMP = {"x86_64": 312, "aarch64": 272}
_KCMP_FILE = 0
_SO_PEERPIDFD = 77
_RWF_NOWAIT = os.RWF_NOWAIT

USERFAULTFD_LINK = "anon_inode:[userfaultfd]"

_ffi = FFI()
_ffi.cdef("long syscall(long number, ...);")
_libc: Any = _ffi.dlopen(None)


def address_of(buffer: mmap.mmap) -> int:
    """Where a buffer of ours lies in memory. The caller keeps it alive."""
    return int(_ffi.cast("uintptr_t", _ffi.from_buffer(buffer)))


class Userfault:
    """A userfaultfd of another process. Owns the descriptor. Single-threaded, as its buffers are."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._copy = bytearray(_COPY.size)
        self._no_wait = True
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def close(self) -> None:
        """Let go of it. The VMM's own descriptor keeps the memory registered."""
        os.close(self.fd)

    def read_events(self, buffer: bytearray) -> int:
        """Read what events there are, whole ones, into `buffer`; how many bytes. Raises BlockingIOError, OSError.

        The other process shares the descriptor's flags and could make it a blocking one, which would stop the pager:
        so the kernel is told for each call not to wait, where it can be (Linux 6.10). Before that, one that was made a
        blocking one is an OSError.
        """
        if self._no_wait:
            try:
                return os.preadv(self.fd, [buffer], -1, _RWF_NOWAIT)
            except OSError as err:
                if err.errno != errno.EOPNOTSUPP:
                    raise
                self._no_wait = False
        # A race remains: a VMM that clears the flag and withdraws its last fault between these calls and the read has
        # us wait for its next one; the supervisor then ends us for hanging, and our successor adopts the other VMs.
        ready = self._poll.poll(0)
        if os.get_blocking(self.fd):
            raise OSError(errno.EINVAL, "it was made a blocking one")
        if not ready:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.readv(self.fd, [buffer])

    def copy(self, address: int, source: int, length: int, mode: int) -> tuple[int, int]:
        """Bring `length` bytes of ours to `address` of theirs and wake who waits: (bytes that arrived, errno or 0)."""
        _COPY.pack_into(self._copy, 0, address, source, length, mode, 0)
        try:
            fcntl.ioctl(self.fd, UFFDIO_COPY, self._copy)
        except OSError as err:
            (copied,) = _COPIED.unpack_from(self._copy, 32)
            return max(0, copied), err.errno or errno.EIO
        return length, 0

    def wake(self, address: int, length: int) -> None:
        """Have every thread that waits for a page in this range try again. Raises OSError."""
        fcntl.ioctl(self.fd, UFFDIO_WAKE, _RANGE.pack(address, length))

    def write_unprotect(self, address: int, length: int) -> None:
        """Make pages count as written (asynchronous protection) or writable (synchronous). Raises OSError."""
        fcntl.ioctl(self.fd, UFFDIO_WRITEPROTECT, _RANGE_MODE.pack(address, length, 0))

    def proceed(self, address: int, length: int) -> None:
        """Map what is in the memory file already (UFFDIO_CONTINUE), for memory that asks about that too."""
        fcntl.ioctl(self.fd, UFFDIO_CONTINUE, bytearray(_CONTINUE.pack(address, length, 0, 0)))


def is_userfaultfd(fd: int, *, process: str = "self") -> bool:
    """Whether a descriptor, of ours or of another process, is a userfaultfd."""
    try:
        return str(Path(f"/proc/{process}/fd/{fd}").readlink()) == USERFAULTFD_LINK
    except OSError:
        return False


def take_descriptor(pidfd: int, number: int) -> int:
    """Duplicate descriptor `number` of another process (pidfd_getfd, Linux 5.6). Raises OSError."""
    return _call(_SYS_PIDFD_GETFD, pidfd, number, 0)


def find_descriptor(pid: int, fd: int) -> int | None:
    """Under which number `pid` holds the same open file as our `fd`; None if it does not. Raises OSError."""
    number = _SYS_KCMP[os.uname().machine]
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if is_userfaultfd(int(entry.name), process=str(pid)):
            try:
                if _call(number, pid, os.getpid(), _KCMP_FILE, int(entry.name), fd) == 0:
                    return int(entry.name)
            except OSError as err:
                if err.errno != errno.EBADF:  # closed since
                    raise
    return None


def peer_pidfd(sock: trio.socket.SocketType, pid: int) -> int:
    """A pidfd of the process at the other end of a unix socket. Raises OSError.

    Before Linux 6.5 by its pid, which the caller has from the socket: the peer still holds the connection.
    """
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as err:
        if err.errno != errno.ENOPROTOOPT:
            raise
    return os.pidfd_open(pid)


def _call(number: int, *arguments: int) -> int:
    result = int(_libc.syscall(number, *(_ffi.cast("long", argument) for argument in arguments)))
    if result < 0:
        raise OSError(_ffi.errno, os.strerror(_ffi.errno))
    return result
