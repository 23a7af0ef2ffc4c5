"""Drives a `Link` over a Trio stream: one reader, one writer, one timer; the base of both kinds of peer.

Owns: the stream, the link's state. Owned by: the nursery that runs `run`.
Emits: `closed` (event) with `reason`. Dies when: the peer goes, breaks the protocol, stays silent, does not read
what we owe it, or `close` is called; `run` then returns, it raises only for bugs.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import trio

from agent.actor.inbox import Growth
from agent.wire import limits
from agent.wire.faults import Fault, FaultCode, RemoteProtocolError

if TYPE_CHECKING:
    from agent.wire.link import Link
    from agent.wire.messages import Frame

HIGH_WATER_BYTES = 512 * 1024
"""Queued output above which senders of DATA wait for the writer if some of theirs is queued already."""

CROWD_BYTES = 4 * 1024 * 1024
"""Queued output above which everybody waits: also streams with nothing queued, new ones, and answers."""

WRITE_BYTES = 128 * 1024
"""Output written in one piece: a frame that is to pass the others waits for the rest of such a piece."""

WOKEN = 16
"""Waiting senders let in by each write: enough for the next ones, and a thousand do not all wake for two places."""

READ_BYTES = 256 * 1024
"""Taken off the stream at a time, if so much has come."""

STEP_BYTES = 64 * 1024
"""Input handled in one step: even all of it in the smallest frames does not hold the loop for long."""

BATCH_BYTES = 128 * 1024
"""Queued output below which a sender goes on without giving way: small chunks leave in one piece then."""

OUTPUT_LIMIT_BYTES = 32 * 1024 * 1024
"""Queued output (small frames are never held back) at which a peer that does not read is dropped."""


class Connection(abc.ABC):
    """One live connection. Subclasses act on frames and on the end."""

    def __init__(self, stream: trio.abc.Stream, link: Link) -> None:
        self.link = link
        self.growth = Growth()
        self.closed = trio.Event()
        self.reason = ""
        self._stream = stream
        self._write_wanted = trio.Event()
        self._room = trio.lowlevel.ParkingLot()
        self._idle = trio.lowlevel.ParkingLot()
        self._writing = False
        self._ready = trio.Event()
        self._scope = trio.CancelScope()
        self.patient = False
        """While set, a peer that is silent is not given up: somebody knows that it stands still."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the connection to its end; `started()` once both sides have said HELLO.

        Raises Fault `unavailable` only to `nursery.start`: when the connection ended before that.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._keep_time)
                    nursery.start_soon(self._read)
                    await self._serve_until_closed(task_status)
        finally:
            self.link.close()
            self.reason = self.reason or "closed"
            self.closed.set()
            self._on_closed()
            self._room.unpark_all()
            self._idle.unpark_all()
            await trio.aclose_forcefully(self._stream)
        if not self._ready.is_set() and task_status is not trio.TASK_STATUS_IGNORED:
            raise lost(self.reason)

    async def _serve_until_closed(self, task_status: trio.TaskStatus[None]) -> None:
        """Announce readiness; subclasses that own handler tasks open their nursery here."""
        await self._ready.wait()
        task_status.started()
        await trio.sleep_forever()

    async def ready(self) -> None:
        """Wait until both sides have said HELLO."""
        await self._ready.wait()

    def close(self, reason: str = "closed by us") -> None:
        """End the connection now."""
        self.reason = self.reason or reason
        self._scope.cancel()

    @abc.abstractmethod
    def _on_frame(self, frame: Frame) -> None:
        """Act on one checked frame; must not block and not raise."""

    @abc.abstractmethod
    def _on_closed(self) -> None:
        """Tell everybody who waits on this connection."""

    def _flush(self) -> None:
        """Frames were queued on the link: wake the writer."""
        self._write_wanted.set()
        if self.link.bytes_to_send > OUTPUT_LIMIT_BYTES:
            self.close("the peer does not read")

    async def _give_way(self) -> None:
        """The checkpoint of senders that need not wait: always one for cancellation, in time one for other tasks."""
        if self.link.bytes_to_send < BATCH_BYTES:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()

    async def _wait_for_room(self, stream: int = 0) -> None:
        """Until `stream`, or something that has none yet, may queue a frame."""
        while not self.closed.is_set():
            limit = HIGH_WATER_BYTES if self.link.has_queued(stream) else CROWD_BYTES
            if self.link.bytes_to_send <= limit:
                return
            await self._room.park()

    def _sendable(self, stream: int, left: int) -> int:
        """How many of `left` bytes go into the next DATA frame; 0 as long as there is not enough credit.

        What fits into one frame is not cut by the credit of the moment, for a frame may be a message. Receivers grant
        half of their window at the latest, so that half always comes back and waiting for it is safe.
        """
        credit = self.link.send_credit(stream)
        window = self.link.peer_hello.initial_credit if self.link.peer_hello is not None else 0
        whole = min(left, limits.MAX_DATA_BYTES, max(1, window // 2))
        return min(left, limits.MAX_DATA_BYTES, credit) if credit >= whole else 0

    async def _wait_until_written(self) -> None:
        while (self.link.bytes_to_send or self._writing) and not self.closed.is_set():
            await self._idle.park()

    async def _read(self) -> None:
        try:
            while True:
                data = await self._stream.receive_some(READ_BYTES)
                await trio.lowlevel.checkpoint_if_cancelled()  # whoever would handle the frames may be gone by now
                if not data:
                    return self.close("the peer closed the connection")
                view = memoryview(data)
                while view:
                    self._handle(view[:STEP_BYTES])
                    view = view[STEP_BYTES:]
                    if view:
                        await trio.lowlevel.checkpoint()
        except RemoteProtocolError as err:
            self.close(f"protocol broken by the peer: {err}")
        except (trio.BrokenResourceError, trio.ClosedResourceError) as err:
            self.close(f"connection lost: {err}")

    def _handle(self, data: memoryview) -> None:
        for frame in self.link.receive_data(data, trio.current_time()):
            self._on_frame(frame)
        if not self._ready.is_set() and self.link.peer_hello is not None:
            self._ready.set()
        if self.link.bytes_to_send:
            self._flush()

    async def _write(self) -> None:
        try:
            while True:
                if not self.link.bytes_to_send:
                    self._room.unpark_all()
                    self._idle.unpark_all()
                    self._write_wanted = trio.Event()
                    await self._write_wanted.wait()
                self._writing = True
                data = self.link.data_to_send(WRITE_BYTES)
                self._room.unpark(count=WOKEN)
                await self._stream.send_all(data)
                self._writing = False
        except (trio.BrokenResourceError, trio.ClosedResourceError) as err:
            self.close(f"connection lost: {err}")

    async def _keep_time(self) -> None:
        try:
            while True:
                # A PONG brings the timer forward again, so look at it at least this often.
                await trio.sleep_until(min(self.link.next_timer(), trio.current_time() + limits.PING_INTERVAL))
                if self.patient and self.link.peer_hello is not None:
                    self.link.excuse(trio.current_time())
                    continue
                self.link.handle_timer(trio.current_time())
                if self.link.bytes_to_send:
                    self._flush()
        except RemoteProtocolError as err:
            self.close(str(err))


def cut(view: memoryview, size: int) -> tuple[bytes, memoryview]:
    """The first `size` bytes, not copied when they are a `bytes` object already, and the rest."""
    whole = view.obj
    if isinstance(whole, bytes) and len(view) == len(whole) <= size:
        return whole, view[:0]
    return bytes(view[:size]), view[size:]


def lost(reason: str) -> Fault:
    """The fault for everything that waits on a connection that is gone."""
    return Fault(FaultCode.UNAVAILABLE, f"the connection was lost ({reason})", retryable=True)
