"""A client's TCP connection that cannot hold us: every write has a deadline, and it can be cut from outside."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from trio.abc import HalfCloseableStream

WRITE_TIMEOUT = 30.0
"""Seconds a client may take to accept the next WRITE_BYTES. hypercorn shields its writes from cancellation, so without
this a client that stops reading would keep its connection, its handler and our shutdown for ever."""

WRITE_BYTES = 64 * 1024

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER with zero seconds: the peer sees a reset, and the kernel keeps nothing for a peer that does not read."""


class ClientStream:
    """What hypercorn uses of a trio.SocketStream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream: HalfCloseableStream = stream
        self.socket = stream.socket

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """BrokenResourceError when the client takes too long."""
        view = memoryview(data)
        for start in range(0, len(view), WRITE_BYTES):
            with trio.move_on_after(WRITE_TIMEOUT) as scope:
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

    def cut(self) -> None:
        """Reset the connection now; whoever waits on it wakes up with a ClosedResourceError."""
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        except OSError:
            return  # closed already
        self.socket.close()
