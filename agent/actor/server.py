"""The serving side of a connection: one task per stream runs the handler.

Owns: the handler tasks of this connection; they end with it. Work that must outlive a connection belongs to an actor,
the handler only waits for it. Owned by: the listener's nursery.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import structlog
import trio

from agent.actor.connection import Connection, cut
from agent.actor.inbox import Inbox
from agent.wire import limits
from agent.wire.faults import Fault, FaultCode, FrameTooLargeError, LocalProtocolError
from agent.wire.link import Link, Role
from agent.wire.messages import Cancel, Credit, Data, End, Failure, Frame, Open

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = structlog.get_logger()

Handler = Callable[[str, dict[str, Any], "ServedStream"], Awaitable[dict[str, Any]]]
"""`await handler(method, body, stream)` returns the reply's body or raises Fault."""


class ServerPeer(Connection):
    """Answers the opener's streams with `handler`."""

    def __init__(self, stream: trio.abc.Stream, handler: Handler, *, max_streams: int = limits.MAX_STREAMS) -> None:
        super().__init__(stream, Link(Role.SERVER, now=trio.current_time(), max_streams=max_streams))
        self._handler = handler
        self._streams: dict[int, ServedStream] = {}
        self._nursery: trio.Nursery | None = None
        self.draining = trio.Event()
        self._answered = trio.lowlevel.ParkingLot()

    async def _serve_until_closed(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await super()._serve_until_closed(task_status)

    async def drain(self, reason: str) -> None:
        """Take no new streams; return when those already open have been answered and written.

        A handler that would go on for ever looks at `ServedStream.draining`.
        """
        self.draining.set()
        self.link.goaway(FaultCode.DRAINING, reason)
        self._flush()
        while self._streams:
            await self._answered.park()
        await self._wait_until_written()

    def _on_frame(self, frame: Frame) -> None:
        match frame:
            case Open():
                stream = self._streams[frame.stream] = ServedStream(self, frame)
                assert self._nursery is not None  # noqa: S101 - opened before the reader's first step
                self._nursery.start_soon(self._answer, stream, frame)
            case Data(stream=number, channel=channel, data=data):
                self._streams[number].inbox.put(channel, data)
            case End(stream=number):
                self._streams[number].inbox.finish()
            case Credit(stream=number):
                self._streams[number].credited()
            case Cancel(stream=number):
                self._streams[number].cancel()

    async def _answer(self, stream: ServedStream, request: Open) -> None:
        if self.draining.is_set():
            answer: dict[str, Any] | Fault = Fault(FaultCode.DRAINING, "this host is shutting down", retryable=True)
        else:
            answer = await self._run_handler(stream, request)
        stream.inbox.discard()
        await self._wait_for_room()
        try:
            self._send_last(stream.number, answer)
        except LocalProtocolError as err:
            log.exception("answer_refused", method=request.method)
            code = FaultCode.TOO_LARGE if isinstance(err, FrameTooLargeError) else FaultCode.INTERNAL
            self._send_last(stream.number, Fault(code, "the answer cannot be sent; the host's log has the details"))
        del self._streams[stream.number]
        self._answered.unpark_all()
        self._flush()

    async def _run_handler(self, stream: ServedStream, request: Open) -> dict[str, Any] | Fault:
        """The handler's answer. Whatever it raises is its own call's failure; only our cancellation goes further."""
        fault = Fault(FaultCode.INTERNAL, "internal error; the host's log has the details")
        try:
            try:
                with stream.scope:
                    return await self._handler(request.method, request.body, stream)
            except Fault as err:
                return err
        except* Exception as bugs:  # a group may mix a bug with a cancellation that is not the stream's
            log.exception("handler_failed", method=request.method, exc_info=bugs)
        return stream.why_cancelled(request.method) if stream.scope.cancelled_caught else fault

    def _send_last(self, number: int, answer: dict[str, Any] | Fault) -> None:
        if isinstance(answer, Fault):
            message = answer.message.encode(errors="replace").decode()[:4096]  # a path in it need not be UTF-8
            self.link.fail(Failure(number, answer.code, message, answer.retryable, answer.details))
        else:
            self.link.reply(number, answer)

    def _on_closed(self) -> None:
        for stream in self._streams.values():
            stream.credited()
        self._streams.clear()
        self._answered.unpark_all()


class ServedStream:
    """What a handler sees of its request: incoming DATA, a way to send, and the opener's deadline."""

    def __init__(self, peer: ServerPeer, request: Open) -> None:
        self.number = request.stream
        self.inbox = Inbox(peer.link, request.stream, peer.growth)
        timeout = request.timeout_ms / 1000 if request.timeout_ms else math.inf
        self.deadline = trio.current_time() + timeout
        self.scope = trio.CancelScope(deadline=self.deadline)
        self._cancelled = False
        self._peer = peer
        self._credit = trio.Event()

    async def send(self, data: bytes | memoryview, channel: int = 0) -> None:
        """Send bytes, waiting for the opener's credit; up to 64 KiB arrive as one chunk."""
        await self._peer._give_way()  # noqa: SLF001
        view = memoryview(data)
        while view:
            await self._peer._wait_for_room(self.number)  # noqa: SLF001
            if self._peer.closed.is_set():
                await trio.sleep_forever()  # the connection's nursery is cancelling this handler
            size = self._peer._sendable(self.number, len(view))  # noqa: SLF001
            if size == 0:
                self._credit = trio.Event()
                await self._credit.wait()
                continue
            chunk, view = cut(view, size)
            self._peer.link.send_data(self.number, channel, chunk)
            self._peer._flush()  # noqa: SLF001

    def __aiter__(self) -> AsyncIterator[tuple[int, bytes]]:
        return self

    async def __anext__(self) -> tuple[int, bytes]:
        """The next (channel, bytes) from the opener; ends at its END."""
        chunk = await self.inbox.get()
        if chunk is None:
            raise StopAsyncIteration
        if self.inbox.grant_due():
            self._peer._flush()  # noqa: SLF001
        return chunk

    @property
    def draining(self) -> trio.Event:
        """Set when the server wants to end: new streams are refused, open ones had better come to an end."""
        return self._peer.draining

    def credited(self) -> None:
        """The opener granted credit, or the connection is gone."""
        self._credit.set()

    def cancel(self) -> None:
        """The opener wants no answer any more."""
        self._cancelled = True
        self.scope.cancel()

    def why_cancelled(self, method: str) -> Fault:
        """The fault for a handler that was stopped."""
        if self._cancelled:
            return Fault(FaultCode.CANCELLED, f"{method} was cancelled by its caller")
        return Fault(FaultCode.DEADLINE_EXCEEDED, f"{method} did not finish in time", retryable=True)
