"""A VMM with bad manners: `python rude_vmm.py SOCKET MODE`. Says when it has done it, then waits to be killed."""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
import time

SIZE = 8 << 20
USERFAULTFD = {"x86_64": 323, "aarch64": 282}[os.uname().machine]


def arm():
    """A userfaultfd for fresh memory, and where that is."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    memory = mmap.mmap(-1, SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("<QQQ", 0xAA, 0, 0)))
    fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("<QQQQ", address, SIZE, 1, 0)))
    return fd, address, memory


def message(address, size=SIZE, **more):
    return json.dumps([{"base_host_virt_addr": address, "size": size, "offset": 0, "page_size": 4096, **more}]).encode()


def say(word):
    os.write(1, word + b"\n")


def main(path, mode):
    sock = socket.socket(socket.AF_UNIX)
    if mode == "stranger":
        os.setuid(12345)
        try:
            sock.connect(path)
            sock.sendall(b"[]")
        except PermissionError:
            say(b"refused")
            return
    else:
        sock.connect(path)
        fd, address, _memory = arm()
        send = {
            "rubbish": (b"GET / HTTP/1.1", [fd]),
            "none": (message(address), []),
            "two": (message(address), [fd, fd]),
            "many": (message(address), [fd] * 100),
            "pipe": (message(address), [os.pipe()[0]]),
            "large": (message(address, size=SIZE * 2), [fd]),
            "long": (b"[" + b" " * 100_000, [fd]),
            "closed": (message(address), [fd]),
        }
        if mode == "dies":
            return
        if mode in send:
            text, descriptors = send[mode]
            socket.send_fds(sock, [text], descriptors)
        if mode == "closed":
            os.close(fd)
    say(b"done")
    time.sleep(1000)


if __name__ == "__main__":
    main(*sys.argv[1:])
