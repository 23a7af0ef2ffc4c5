"""The dialling side of a connection: opens streams and reads their answers.

Owns: the streams it opened. Owned by: whoever runs `run` (a host link, a sandbox's guest link).
Dies when: see `Connection`; every open stream then fails with `unavailable`, which is retryable.
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from agent.actor.connection import Connection, cut, lost
from agent.actor.inbox import Growth, Inbox
from agent.wire import limits
from agent.wire.faults import Fault, FaultCode, LocalProtocolError
from agent.wire.link import Link, LinkState, Role
from agent.wire.messages import Credit, Data, Failure, Frame, Reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GRACE = 2.0
"""Seconds the server gets to report its own time-out before we stop waiting."""


class OpenerPeer(Connection):
    """Asks the server. `run` must be running in a nursery; `open_stream` and `call` may be used by many tasks."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        max_frame_bytes: int = limits.MAX_FRAME_BYTES,
        max_depth: int = limits.MAX_DEPTH,
        growth: Growth | None = None,
    ) -> None:
        """`max_frame_bytes`, `max_depth`: a hostile server's largest answer costs up to 1 µs and 70 bytes per byte to
        decode, the more the deeper it is nested. `growth`: of the windows; None: as is usual between distant peers."""
        link = Link(Role.OPENER, now=trio.current_time(), max_frame_bytes=max_frame_bytes, max_depth=max_depth)
        super().__init__(stream, link)
        self.growth = growth or self.growth
        self._streams: dict[int, OpenedStream] = {}

    async def call(self, method: str, body: dict[str, Any], *, timeout: float) -> dict[str, Any]:  # noqa: ASYNC109
        """Ask and wait for the one answer. Raises Fault; `unavailable` when the connection is lost."""
        async with self.open_stream(method, body, timeout=timeout) as stream:
            await stream.end()
            return await stream.reply()

    @asynccontextmanager
    async def open_stream(
        self,
        method: str,
        body: dict[str, Any],
        *,
        timeout: float = math.inf,  # noqa: ASYNC109
    ) -> AsyncIterator[OpenedStream]:
        """Open a stream for `method`; leaving the block before its last frame cancels it on the server.

        `timeout` (seconds) travels with the request; the whole block ends with Fault `deadline_exceeded` soon after it.
        """
        deadline = trio.current_time() + timeout
        with trio.CancelScope(deadline=deadline + GRACE) as scope:
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._wait_for_room()
            stream = self._open(method, body, deadline)
            try:
                yield stream
            finally:
                self._leave(stream)
        if scope.cancelled_caught:
            raise Fault(FaultCode.DEADLINE_EXCEEDED, f"{method} got no answer in {timeout:g} s", retryable=True)

    def _open(self, method: str, body: dict[str, Any], deadline: float) -> OpenedStream:
        if self.link.state is LinkState.DRAINING:
            raise Fault(FaultCode.DRAINING, "the host is shutting down", retryable=True)
        if self.link.state is not LinkState.READY or self.link.peer_hello is None:
            raise lost(self.reason or "not connected")
        if self.link.open_streams() >= self.link.peer_hello.max_streams:
            raise Fault(FaultCode.BUSY, "too many requests at once on this connection", retryable=True)
        if self.link.ids_used_up():
            self.close("its stream ids are used up")
            raise lost(self.reason)
        left = deadline - trio.current_time()
        timeout_ms = 0 if math.isinf(left) else max(1, min(round(left * 1000), 2**31 - 1))
        try:
            number = self.link.open_stream(method, body, timeout_ms=timeout_ms)
        except LocalProtocolError as err:
            raise Fault(FaultCode.INVALID_ARGUMENT, str(err)) from err
        stream = self._streams[number] = OpenedStream(self, number)
        self._flush()
        return stream

    def _leave(self, stream: OpenedStream) -> None:
        """Nobody waits any more: what still arrives is dropped; the entry goes with the last frame."""
        stream.abandoned = True
        stream.inbox.discard()
        if self.link.has_stream(stream.number) and self.link.state is not LinkState.CLOSED:
            self.link.cancel(stream.number)
            self._flush()

    def _on_frame(self, frame: Frame) -> None:
        match frame:
            case Data(stream=number, channel=channel, data=data):
                stream = self._streams[number]
                if not stream.abandoned:
                    stream.inbox.put(channel, data)
            case Credit(stream=number):
                self._streams[number].credited()
            case Reply(stream=number) | Failure(stream=number):
                self._streams.pop(number).finish(frame)

    def _on_closed(self) -> None:
        for stream in self._streams.values():
            stream.finish(None)
        self._streams.clear()


class OpenedStream:
    """One request in progress."""

    def __init__(self, peer: OpenerPeer, number: int) -> None:
        self.number = number
        self.abandoned = False
        self.inbox = Inbox(peer.link, number, peer.growth)
        self._peer = peer
        self._last: Reply | Failure | None = None
        self._finished = trio.Event()
        self._credit = trio.Event()

    async def send(self, data: bytes | memoryview, channel: int = 0) -> None:
        """Send bytes, waiting for the server's credit; up to 64 KiB arrive as one chunk. Stops quietly when the answer
        is already there.

        Raises Fault `unavailable` when the connection is lost.
        """
        await self._peer._give_way()  # noqa: SLF001
        view = memoryview(data)
        while view and not self._finished.is_set():
            await self._peer._wait_for_room(self.number)  # noqa: SLF001
            if self._finished.is_set():
                break
            size = self._peer._sendable(self.number, len(view))  # noqa: SLF001
            if size == 0:
                self._credit = trio.Event()
                await self._credit.wait()
                continue
            chunk, view = cut(view, size)
            self._peer.link.send_data(self.number, channel, chunk)
            self._peer._flush()  # noqa: SLF001
        if self._finished.is_set() and self._last is None:
            raise lost(self._peer.reason)

    async def end(self) -> None:
        """No more bytes from us."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._finished.is_set():
            self._peer.link.send_end(self.number)
            self._peer._flush()  # noqa: SLF001

    def __aiter__(self) -> OpenedStream:
        return self

    async def __anext__(self) -> tuple[int, bytes]:
        """The next (channel, bytes); ends when the last frame has come (then `reply` tells how)."""
        chunk = await self.inbox.get()
        if chunk is None:
            raise StopAsyncIteration
        if self.inbox.grant_due():
            self._peer._flush()  # noqa: SLF001
        return chunk

    def more(self, channel: int, most: int) -> list[bytes]:
        """What has come on `channel` behind the chunk read last, at most `most` bytes; what has not come is not waited
        for. A reader that hands on many chunks as one has less to do."""
        chunks = self.inbox.more(channel, most)
        if chunks and self.inbox.grant_due():
            self._peer._flush()  # noqa: SLF001
        return chunks

    async def reply(self) -> dict[str, Any]:
        """Wait for the last frame; the answer's body, or the server's Fault."""
        await self._finished.wait()
        match self._last:
            case Reply(body=body):
                return body
            case Failure() as failure:
                raise Fault(failure.code, failure.message, retryable=failure.retryable, details=failure.details)
            case None:
                raise lost(self._peer.reason)

    def credited(self) -> None:
        """The server granted credit."""
        self._credit.set()

    def finish(self, last: Reply | Failure | None) -> None:
        """The last frame came, or None: the connection is lost."""
        self._last = last
        self._finished.set()
        self._credit.set()
        self.inbox.finish()
