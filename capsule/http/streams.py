"""A client's TCP connection that cannot hold us: every write has a deadline, and it can be cut from outside."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from trio.abc import HalfCloseableStream

WRITE_TIMEOUT = 30.0
"""Seconds a client may take to accept the next WRITE_BYTES. hypercorn shields its writes from cancellation, so without
this a client that stops reading would keep its connection, its handler and our shutdown for ever."""

WRITE_BYTES = 65 * 1024
"""Written at a time, and what a client has its patience for: 64 KiB with the head of a message or chunk."""

CLIENT = "capsule.client"
"""A request's ClientStream in its scope's `state`, which is where ASGI has what belongs to the connection."""

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER with zero seconds: the peer sees a reset, and the kernel keeps nothing for a peer that does not read."""


TCP_INFO = struct.Struct("=B55xI")
"""Of struct tcp_info (linux/tcp.h): tcpi_state, and tcpi_last_ack_recv, milliseconds since the last acknowledgement."""

ESTABLISHED = 1
"""TCP_ESTABLISHED; with the client's FIN it becomes another."""


class ClientStream:
    """What hypercorn uses of a trio.SocketStream, and what WebSockets need beside it. `patience`: seconds a client may
    take for WRITE_BYTES; None: WRITE_TIMEOUT."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.patience: float | None = None
        self._stream: HalfCloseableStream = stream
        self.socket = stream.socket

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """BrokenResourceError when the client takes too long."""
        view = memoryview(data)
        for start in range(0, len(view), WRITE_BYTES):
            with trio.move_on_after(WRITE_TIMEOUT if self.patience is None else self.patience) as scope:
                await self._stream.send_all(view[start : start + WRITE_BYTES])
            if scope.cancelled_caught:
                self.cut()
                raise trio.BrokenResourceError("the client does not read")

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As of a stream."""
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        """As of a stream."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """As of a stream."""
        await self._stream.aclose()

    def unsent(self) -> int:
        """Bytes that the client's machine has not acknowledged; 0 for a connection that is closed."""
        try:
            return int(struct.unpack("i", fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
        except (OSError, ValueError):
            return 0

    def silence(self) -> float:
        """Seconds since the client's machine acknowledged anything. It does so for a program that does not read, too:
        when it has no room left the kernel asks it again and again (RFC 9293 §3.8.6.1)."""
        return self._tcp_info()[1] / 1000

    def hung_up(self) -> bool:
        """Whether the client closed the connection, although bytes that it sent before may still wait to be read."""
        return self._tcp_info()[0] != ESTABLISHED

    def _tcp_info(self) -> tuple[int, int]:
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
        except OSError:
            return 0, 0
        state, last_ack = TCP_INFO.unpack(info)
        return state, last_ack

    def cut(self) -> None:
        """Reset the connection now; whoever waits on it wakes up with a ClosedResourceError."""
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        except OSError:
            return  # closed already
        self.socket.close()
