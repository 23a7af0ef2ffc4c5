"""A way to a server that a test can cut."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

import trio

BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


class Proxy:
    """Passes on, both ways. `budget`: bytes towards the client until everything is cut; `closed`: nobody gets in;
    `passed`: what has gone to the client."""

    def __init__(self, port):
        self._port = port
        self._scopes = set()
        self.budget = None
        self.passed = bytearray()
        self.closed = False
        self.cuts = 0
        self.turned_away = trio.Event()

    async def serve(self, *, task_status):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        await trio.serve_listeners(self._connection, [listener], task_status=task_status)

    def cut(self, *, closed=False):
        """Everything that is open, as a cable that is pulled; `closed`: and nothing new gets through."""
        self.closed = closed
        self.cuts += 1
        for scope in self._scopes:
            scope.cancel()

    async def _connection(self, client):
        if self.closed:
            self.turned_away.set()
            _reset(client)
            return
        upstream = trio.socket.socket()
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await upstream.connect(("127.0.0.1", self._port))
        server = trio.SocketStream(upstream)
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass, client, server, False)
                nursery.start_soon(self._pass, server, client, True)
        self._scopes.discard(scope)
        for stream in (client, server):
            if scope.cancelled_caught:
                _reset(stream)
            else:
                await stream.aclose()

    async def _pass(self, source, sink, counted):
        with suppress(*BROKEN):
            async for data in source:
                if counted and self.budget is not None:
                    self.budget -= len(data)
                    if self.budget <= 0:
                        self.budget = None
                        self.cut()
                await sink.send_all(data)
                if counted:
                    self.passed += data
            await sink.send_eof()


def _reset(stream):
    with suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()
