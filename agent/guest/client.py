"""The host's end of the connection to one guest daemon.

Owns: the TCP connection and its peer. Owned by: the sandbox actor, which runs `run` in its nursery.
Takes: `open_stream`, `call` from any task. Dies when: the sandbox actor's nursery is cancelled. A connection that
breaks (an agent restart, a guest daemon that closed it) is made again as long as the VM lives. The guest is hostile:
whatever it sends is checked by the link, and costs its own connection at worst.
"""

from __future__ import annotations

import math
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog
import trio

from agent.actor.peer import OpenedStream, OpenerPeer
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = structlog.get_logger()

GUEST_PORT = 5000
ATTEMPT_TIMEOUT = 0.5
"""One try to connect. Short: while the guest boots, the kernel's own SYN retries come a second and more apart."""
PAUSE = 0.05
CONNECT_TIMEOUT = 15.0
"""How long a call waits for a connection that is being made again."""


class GuestLink:
    """Keeps a connection to the guest daemon at `address`."""

    def __init__(self, address: str, port: int = GUEST_PORT) -> None:
        self._address = address
        self._port = port
        self._peer: OpenerPeer | None = None
        self._connected = trio.Event()

    async def run(self) -> None:
        """Connect, serve, connect again; until cancelled."""
        while True:
            stream = await self._dial()
            peer = OpenerPeer(stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_peer, peer, nursery.cancel_scope)
                await peer.ready()
                self._peer = peer
                self._connected.set()
            self._peer = None
            self._connected = trio.Event()
            log.info("guest_connection_lost", address=self._address, reason=peer.reason)
            await trio.sleep(PAUSE)

    async def _run_peer(self, peer: OpenerPeer, scope: trio.CancelScope) -> None:
        await peer.run()
        scope.cancel()

    async def _dial(self) -> trio.SocketStream:
        while True:
            with trio.move_on_after(ATTEMPT_TIMEOUT):
                sock = trio.socket.socket()
                try:
                    await sock.connect((self._address, self._port))
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return trio.SocketStream(sock)
                except OSError:
                    sock.close()
                except trio.Cancelled:
                    sock.close()
                    raise
            await trio.sleep(PAUSE)

    async def wait_connected(self, deadline: float) -> OpenerPeer:
        """The live peer. Fault `unavailable` when there is none until `deadline` (Trio time)."""
        with trio.move_on_at(deadline):
            while self._peer is None:
                await self._connected.wait()
            return self._peer
        raise Fault(FaultCode.UNAVAILABLE, "the guest daemon does not answer", retryable=True)

    async def call(self, method: str, body: dict[str, Any], *, timeout: float) -> dict[str, Any]:  # noqa: ASYNC109
        """Ask the guest daemon and wait for its answer."""
        peer = await self.wait_connected(trio.current_time() + min(timeout, CONNECT_TIMEOUT))
        return await peer.call(method, body, timeout=timeout)

    @asynccontextmanager
    async def open_stream(
        self,
        method: str,
        body: dict[str, Any],
        *,
        timeout: float = math.inf,  # noqa: ASYNC109
    ) -> AsyncIterator[OpenedStream]:
        """Open a stream to the guest daemon; see `OpenerPeer.open_stream`."""
        peer = await self.wait_connected(trio.current_time() + min(timeout, CONNECT_TIMEOUT))
        async with peer.open_stream(method, body, timeout=timeout) as stream:
            yield stream
