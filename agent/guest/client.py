"""The host's end of the connection to one guest daemon.

Owns: the TCP connection and its peer. Owned by: the sandbox actor, which runs `run` in its nursery.
Takes: `open_stream`, `call` from any task. Dies when: the sandbox actor's nursery is cancelled. A connection that
breaks (an agent restart, a guest daemon that closed it) is made again as long as the VM lives; from a `settle` to the
next `thaw`, silence does not break it. The guest is hostile: whatever it sends is checked by the link, and costs its
own connection at worst.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import structlog
import trio

from agent.actor.inbox import Growth
from agent.actor.peer import OpenedStream, OpenerPeer
from agent.actor.supervise import RestartPolicy
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = structlog.get_logger()

GUEST_PORT = 5000
ATTEMPT_TIMEOUT = 0.5
"""One try to connect. Short: while the guest boots, the kernel's own SYN retries come a second and more apart."""
SHORTEST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
PAUSE_SHARE = 0.02
"""Between tries, of the time waited so far: a boot is noticed 2 % late, a guest without a daemon costs little."""
RECONNECT = RestartPolicy(first_delay=0.05, max_delay=10)
"""A guest that breaks every connection pays with its own time, not with ours."""
STABLE = 10.0
"""Seconds after which a connection counts as a good one."""
CONNECT_TIMEOUT = 15.0
"""How long a call waits for a connection that is being made again."""
MAX_GUEST_FRAME_BYTES = 192 * 1024
"""The guest daemon's largest answer, `processes.list` of 128 processes, has about 150 KiB. A hostile guest's largest
one costs the loop a few ten milliseconds."""
MAX_GUEST_DEPTH = 6
"""Levels of a guest's answer: its entries are maps in a list in a map. Deep ones are what makes decoding slow."""

Connect = Callable[[str, int], Awaitable[trio.abc.Stream]]


async def connect_tcp(address: str, port: int) -> trio.SocketStream:
    """One try. Raises OSError."""
    sock = trio.socket.socket()
    try:
        await sock.connect((address, port))
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise


class GuestLink:
    """Keeps a connection to the guest daemon at `address`, an IPv4 address."""

    def __init__(self, address: str, port: int = GUEST_PORT, *, connect: Connect = connect_tcp) -> None:
        self._address = address
        self._port = port
        self._connect = connect
        self._peer: OpenerPeer | None = None
        self._connected = trio.Event()

    async def run(self) -> None:
        """Connect, serve, connect again; until cancelled."""
        failures = 0
        while True:
            peer = OpenerPeer(
                await self._dial(),
                max_frame_bytes=MAX_GUEST_FRAME_BYTES,
                max_depth=MAX_GUEST_DEPTH,
                growth=Growth(alone=True),
            )
            began = trio.current_time()
            try:
                await self._serve(peer)
            finally:
                self._peer = None
                if self._connected.is_set():  # else somebody may wait on it for the next connection
                    self._connected = trio.Event()
            failures = 1 if trio.current_time() - began >= STABLE else failures + 1
            pause = RECONNECT.delay(failures)
            log.info("guest_connection_lost", address=self._address, reason=peer.reason, retry_seconds=pause)
            await trio.sleep(pause)

    async def _serve(self, peer: OpenerPeer) -> None:
        """One connection, to its end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, peer)
            await peer.run()
            nursery.cancel_scope.cancel()

    async def _announce(self, peer: OpenerPeer) -> None:
        await peer.ready()
        self._peer = peer
        self._connected.set()

    async def _dial(self) -> trio.abc.Stream:
        began = trio.current_time()
        while True:
            with trio.move_on_after(ATTEMPT_TIMEOUT), suppress(OSError):
                return await self._connect(self._address, self._port)
            waited = trio.current_time() - began
            await trio.sleep(min(max(SHORTEST_PAUSE, waited * PAUSE_SHARE), LONGEST_PAUSE))

    async def wait_connected(self, deadline: float) -> OpenerPeer:
        """The live peer. Fault `unavailable` when there is none until `deadline` (Trio time)."""
        with trio.move_on_at(deadline):
            while self._peer is None or self._peer.closed.is_set():
                await self._connected.wait()
                await trio.lowlevel.checkpoint()  # `run` is about to see that the connection has ended
            return self._peer
        raise Fault(FaultCode.UNAVAILABLE, "the guest daemon does not answer", retryable=True)

    async def call(self, method: str, body: dict[str, Any], *, timeout: float) -> dict[str, Any]:  # noqa: ASYNC109
        """Ask the guest daemon and wait for its answer."""
        peer = await self.wait_connected(trio.current_time() + min(timeout, CONNECT_TIMEOUT))
        if method == "settle":
            peer.patient = True  # its VM is about to stand still, and may have streams open that outlive that
        try:
            return await peer.call(method, body, timeout=timeout)
        finally:
            if method == "thaw":
                peer.patient = False

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
