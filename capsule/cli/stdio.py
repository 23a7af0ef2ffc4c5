"""Our own standard streams, without ever blocking the loop, and without changing what we share with our parent.

Never O_NONBLOCK: it would hold for everybody who has the same terminal or pipe open, and outlive us.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import trio

CHUNK = 64 * 1024
STDIN, STDOUT, STDERR = 0, 1, 2


async def read_some(fd: int) -> bytes:
    """What there is, at most `CHUNK` bytes; b"" at the end. Cancelled, it has taken nothing."""
    while True:
        try:
            await trio.lowlevel.wait_readable(fd)
        except PermissionError:  # epoll refuses files, which are always readable
            await trio.lowlevel.checkpoint()
        try:
            return await trio.to_thread.run_sync(os.read, fd, CHUNK, abandon_on_cancel=True)
        except BlockingIOError:  # somebody else's O_NONBLOCK, and their read came first
            continue


async def chunks(fd: int) -> AsyncIterator[bytes]:
    """All of it."""
    while chunk := await read_some(fd):
        yield chunk


async def write_all(fd: int, data: bytes) -> None:
    """Waits as long as the reader does not take it. OSError as write(2): BrokenPipeError when nobody reads."""
    view = memoryview(data)
    while view:
        try:
            written = await trio.to_thread.run_sync(os.write, fd, view, abandon_on_cancel=True)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(fd)
            continue
        view = view[written:]


def hold_places() -> None:
    """A standard stream that is closed must not become the next thing that we open, such as a connection: then our
    output would go there. In its place something that fails as a closed one does."""
    for fd, wrong_way in ((STDIN, os.O_WRONLY), (STDOUT, os.O_RDONLY), (STDERR, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, wrong_way)  # the lowest number that is free: this one


def is_terminal(fd: int) -> bool:
    """Whether somebody sits there. False for a descriptor that is closed."""
    return os.isatty(fd)
