"""One open WebSocket: messages both ways, pings, and an end with a close frame.

Owns: the connection's bytes after the upgrade; the tasks that read, ping, and answer pings.
Owned by: `endpoint.SocketEndpoint`, which runs it with a `talk`.
Takes: `send`, `send_bytes`, `receive` from the talk; `finish` from anybody.
Emits: frames; never half of one before a close frame.
Dies when: the talk is over, `finish` was called, the client closed or is gone, or the server shuts down. The first of
these decides the code; then the client has a while to answer our close frame.

Nothing here grows with what a client sends: what it sends faster than the talk receives waits on its own socket, of
pings only the last one is answered (RFC 6455 §5.5.3), and messages are bounded in `frames`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import structlog
import trio

from capsule.http.sockets import ends, frames
from capsule.http.sockets.ends import DONE, GOING_AWAY, LOST_CODE, End
from capsule.http.sockets.frames import BrokenFrames, Close, Decoder, Event, Message, Ping
from capsule.http.sockets.messages import Out, encode

PING_INTERVAL = 30.0
"""Seconds between pings."""

DEAD_AFTER = 90.0
"""Seconds after which a machine that acknowledges no packet counts as gone: three pings. One whose program merely does
not read acknowledges them."""

STALL_TIMEOUT = 900.0
"""Seconds a client may go without taking output or answering a ping."""

HANG_UP_INTERVAL = 2.0
"""Seconds between looks whether the client of a talk that takes nothing is still there."""

CLOSE_TIMEOUT = 5.0
"""Seconds for the client's half of the closing handshake."""

READ_BYTES = 64 * 1024
SLICE_BYTES = 4096
"""Bytes that are decoded at a time: 700 frames of the smallest kind, and then others have their turn."""

log = structlog.get_logger()


class ByteStream(Protocol):
    """What is used of `capsule.http.streams.ClientStream`."""

    patience: float | None

    async def send_all(self, data: bytes) -> None:
        """See there."""
        ...

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See there."""
        ...

    async def send_eof(self) -> None:
        """See there."""
        ...

    def cut(self) -> None:
        """See there."""
        ...

    def unsent(self) -> int:
        """See there."""
        ...

    def silence(self) -> float:
        """See there."""
        ...

    def hung_up(self) -> bool:
        """See there."""
        ...


class Waitable(Protocol):
    """An event of trio's or hypercorn's."""

    async def wait(self) -> None:
        """Until it happens."""
        ...


class WebSocket:
    """See above. `sent` and `received`: bytes on the wire. `end`: how it ended. `patience`: seconds without progress in
    which output that is still on its way when the talk is over may arrive; raise it for who is let in."""

    def __init__(self, stream: ByteStream, early: bytes = b"") -> None:
        self.sent = 0
        self.received = 0
        self.end: End | None = None
        self.patience = CLOSE_TIMEOUT
        self._stream = stream
        stream.patience = STALL_TIMEOUT
        self._early = early
        self._decoder = Decoder()
        self._put, self._get = trio.open_memory_channel[Message](0)
        self._writing = trio.Lock()
        self._ended = trio.Event()
        self._closed = trio.Event()
        self._talking = trio.CancelScope()
        self._leaving = trio.CancelScope()
        self._ping_payload: bytes | None = None
        self._pinged = trio.Event()
        self._heard = trio.current_time()
        self._held_up = False

    async def run(self, talk: Callable[[WebSocket], Awaitable[None]], closing: Waitable) -> End:
        """Talk until it ends; `closing` ends it with 1001. Only Cancelled is raised, and then the connection is cut."""
        try:
            async with trio.open_nursery() as nursery:
                for task in (self._read, self._ping, self._pong):
                    nursery.start_soon(task)
                nursery.start_soon(self._shut_down, closing)
                nursery.start_soon(self._talk, talk)
                await self._ended.wait()
                await self._leave()
                nursery.cancel_scope.cancel()
        except BaseException:
            self._stream.cut()
            raise
        return self.end or DONE

    def finish(self, end: End) -> None:
        """End it now: what the client has not taken within CLOSE_TIMEOUT it never gets. Nothing when it has ended."""
        if self.end is None:
            self._hurry()
            self._finish(end)

    def _finish(self, end: End) -> None:
        if self.end is None:
            if self.patience <= CLOSE_TIMEOUT:
                self._hurry()  # a stranger may not stay by taking our last bytes one at a time
            self.end = end
            self._get.close()
            self._ended.set()

    async def receive(self) -> Message:
        """The client's next message. Waits for ever when there is none any more: the talk is about to be cancelled."""
        try:
            return await self._get.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            return await trio.sleep_forever()

    async def send(self, message: Out) -> None:
        """A text message; waits until the client takes it."""
        await self._write(frames.text_frame(encode(message)))

    async def send_bytes(self, data: bytes) -> None:
        """A binary message, likewise."""
        await self._write(frames.binary_frame(data))

    async def _write(self, frame: bytes) -> None:
        async with self._writing:
            if self.end is None:
                # Half a frame would be the end of all that follows, of the close frame too. The stream gives up after
                # `patience`, and when it is cut.
                with trio.CancelScope(shield=True):
                    sent = await self._transmit(frame)
                if sent:
                    return
        await trio.sleep_forever()  # it has ended: whoever writes is about to be cancelled

    async def _transmit(self, frame: bytes) -> bool:
        try:
            await self._stream.send_all(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as err:
            self.finish(ends.lost(str(err) or "the connection is closed"))
            return False
        self.sent += len(frame)
        return True

    async def _talk(self, talk: Callable[[WebSocket], Awaitable[None]]) -> None:
        try:
            with self._talking:
                await talk(self)
        except Exception as err:
            end = ends.of_exception(err)
            if end is None:
                log.exception("stream_failed")
            self._finish(end or ends.of_bug())
        else:
            self._finish(DONE)

    async def _shut_down(self, closing: Waitable) -> None:
        await closing.wait()
        self.finish(GOING_AWAY)
        self._hurry()

    # what comes

    async def _read(self) -> None:
        try:
            await self._take(self._early)
            while not self._closed.is_set():
                data = bytes(await self._stream.receive_some(READ_BYTES))
                if not data:
                    self._hang_up("the client hung up without a close frame")
                await self._take(data)
        except BrokenFrames as err:
            self.finish(End(err.code, err.reason))
            await self._discard()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._hang_up("the connection was reset")

    async def _take(self, data: bytes) -> None:
        self.received += len(data)
        for start in range(0, len(data), SLICE_BYTES):
            for event in self._decoder.feed(data[start : start + SLICE_BYTES]):
                self._heard = trio.current_time()
                await self._handle(event)
            await trio.lowlevel.checkpoint()

    async def _handle(self, event: Event) -> None:
        match event:
            case Message():
                await self._hand_over(event)
            case Ping():
                self._ping_payload = event.payload
                self._pinged.set()
            case Close():
                self.finish(End(event.code))
                self._closed.set()

    async def _hand_over(self, message: Message) -> None:
        """Wait until the talk takes it; meanwhile nothing is read, not even that the client hung up: look for that."""
        self._held_up = True
        while self.end is None and not self._stream.hung_up():
            with trio.move_on_after(HANG_UP_INTERVAL) as waiting:
                with suppress(trio.BrokenResourceError):  # it ends; what comes is read for the close frame in it
                    await self._put.send(message)
            if not waiting.cancelled_caught:
                break
        else:
            self.finish(ends.lost("the client hung up without a close frame"))
        self._held_up = False
        self._heard = trio.current_time()

    async def _discard(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self._stream.receive_some(READ_BYTES):
                pass
        self._closed.set()

    def _hang_up(self, reason: str) -> None:
        self.finish(ends.lost(reason))
        self._closed.set()

    # is anybody there?

    async def _pong(self) -> None:
        while True:
            await self._pinged.wait()
            self._pinged = trio.Event()
            if self._ping_payload is not None:
                payload, self._ping_payload = self._ping_payload, None
                await self._write(frames.pong_frame(payload))

    async def _ping(self) -> None:
        while True:
            await trio.sleep(PING_INTERVAL)
            if self._stream.silence() > DEAD_AFTER:
                self.finish(ends.lost("the client's machine does not answer"))
            elif not self._held_up and trio.current_time() - self._heard > STALL_TIMEOUT:
                self.finish(ends.lost("the client does not answer pings"))
            elif not self._writing.locked():
                await self._write(frames.ping_frame())

    # the end

    def _hurry(self) -> None:
        self._leaving.deadline = min(self._leaving.deadline, trio.current_time() + CLOSE_TIMEOUT)

    async def _leave(self) -> None:
        """Close frame first, then the talk is ended, however long that takes; then the client answers, or not."""
        with self._leaving:
            if self.end is None or self.end.code == LOST_CODE or not await self._say_goodbye(self.end):
                self._stream.cut()
            self._talking.cancel()
            if await self._answered():
                await self._hang_out()
                return
        self._talking.cancel()
        self._stream.cut()

    async def _say_goodbye(self, end: End) -> bool:
        with trio.move_on_after(self.patience):
            async with self._writing:
                message = frames.text_frame(end.message) if end.message else b""
                return await self._transmit(message + frames.close_frame(end.code, end.reason))
        return False

    async def _answered(self) -> bool:
        """Whether the client closed, too, or has at least been sent all we had. As long as it takes some of it now and
        then, it has time."""
        left, quiet = self._stream.unsent(), 0.0
        while not self._closed.is_set():
            with trio.move_on_after(CLOSE_TIMEOUT):
                await self._closed.wait()
                break
            unsent = self._stream.unsent()
            if unsent == 0:
                break
            quiet = quiet + CLOSE_TIMEOUT if unsent >= left else 0.0
            if quiet >= self.patience:
                return False
            left = unsent
        return True

    async def _hang_out(self) -> None:
        try:
            await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._stream.cut()
