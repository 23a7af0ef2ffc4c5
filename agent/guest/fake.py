"""A guest daemon that is a coroutine: the same frames as the real one, over a stream in memory.

For tests and for hosts that only pretend. It knows the methods that need no operating system; `exec` runs none, it
answers what `programs` says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from agent.actor.peer import OpenedStream, OpenerPeer
from agent.actor.server import ServedStream, ServerPeer
from agent.wire.calls import NOTICE_CHANNEL, STDOUT_CHANNEL
from agent.wire.faults import Fault, FaultCode
from agent.wire.messages import Body

Program = Callable[[Body], tuple[bytes, int]]


def echo(body: Body) -> tuple[bytes, int]:
    """Print the command line, exit 0."""
    return (" ".join([body["cmd"], *body.get("args", [])]) + "\n").encode(), 0


class FakeGuest:
    """Keeps `agent.guest.driver.Guest`. `boots` False: it never answers."""

    def __init__(self, address: str, *, program: Program = echo, boots: bool = True) -> None:
        self.address = address
        self.configured: Body = {}
        self._program = program
        self._boots = boots
        self._peer: OpenerPeer | None = None
        self._connected = trio.Event()

    async def run(self) -> None:
        """Serve and keep the connection; until cancelled."""
        if not self._boots:
            await trio.sleep_forever()
        near, far = _stream_pair()
        server = ServerPeer(far, self._answer)
        peer = OpenerPeer(near)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            await nursery.start(peer.run)
            self._peer = peer
            self._connected.set()

    async def wait_connected(self, deadline: float) -> object:
        """See Guest."""
        with trio.move_on_at(deadline):
            await self._connected.wait()
            return self._peer
        raise Fault(FaultCode.UNAVAILABLE, "the guest daemon does not answer", retryable=True)

    async def call(self, method: str, body: Body, *, timeout: float) -> Body:  # noqa: ASYNC109
        """See Guest."""
        async with self.open_stream(method, body, timeout=timeout) as stream:
            return await stream.reply()

    @asynccontextmanager
    async def open_stream(self, method: str, body: Body, *, timeout: float) -> AsyncIterator[OpenedStream]:  # noqa: ASYNC109
        """See Guest."""
        await self.wait_connected(trio.current_time() + timeout)
        assert self._peer is not None  # noqa: S101 - connected
        async with self._peer.open_stream(method, body, timeout=timeout) as stream:
            yield stream

    async def _answer(self, method: str, body: Body, stream: ServedStream) -> dict[str, Any]:
        match method:
            case "configure":
                self.configured = body
                return {}
            case "exec":
                output, code = self._program(body)
                await stream.send(b"\x82\xa3pid\x07\xa3tag\xa1t", NOTICE_CHANNEL)
                if output:
                    await stream.send(output, STDOUT_CHANNEL)
                return {"exit_code": code, "duration_ms": 1, "timed_out": False}
            case "processes.list":
                return {"processes": []}
            case _:
                raise Fault(FaultCode.UNKNOWN_METHOD, f"the fake guest does not know {method}")


def _stream_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
    from trio.testing import memory_stream_pair  # noqa: PLC0415 - only a fake needs Trio's testing parts

    return memory_stream_pair()
