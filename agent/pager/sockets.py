"""The pager's unix sockets: made, reached and asked who is at the other end."""

from __future__ import annotations

import os
import socket
import stat
import struct
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKLOG = 16
_CREDENTIALS = struct.Struct("=iii")


class Credentials(NamedTuple):
    """Who connected, as the kernel says."""

    pid: int
    uid: int
    gid: int


def listen_unix(path: Path, *, uid: int) -> socket.socket:
    """Make a listening socket that only `uid` may connect to, instead of what was there. Raises OSError.

    Paths may be longer than the 107 bytes of a socket's address: only the last part counts. Our umask must keep others
    out (see `__main__`).
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with _directory(path) as directory:
            with suppress(FileNotFoundError):
                os.unlink(path.name, dir_fd=directory)
            sock.bind(f"/proc/self/fd/{directory}/{path.name}")
            os.chown(path.name, uid, -1, dir_fd=directory, follow_symlinks=False)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def remove_socket(path: Path) -> None:
    """Remove a socket's name; harmless when it is gone or something else."""
    with suppress(OSError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()


async def connect_unix(path: Path) -> trio.SocketStream:
    """Connect to a socket. Raises OSError."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _directory(path) as directory:
            await sock.connect(f"/proc/self/fd/{directory}/{path.name}")
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise


def peer_credentials(sock: trio.socket.SocketType) -> Credentials:
    """Who is at the other end. Raises OSError."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Credentials(*_CREDENTIALS.unpack(raw))


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
