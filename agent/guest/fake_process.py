"""One process of a fake guest: its program, its ring of output, and who is attached to it (docs/protocol.md)."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import msgspec
import trio

from agent.actor.server import ServedStream
from agent.guest.fake_programs import LiveProgram
from agent.wire.calls import NOTICE_CHANNEL, STDOUT_CHANNEL
from agent.wire.faults import Fault, FaultCode
from agent.wire.messages import Body

RING_BYTES = 64 * 1024
PIPE_BYTES = 64 * 1024
CHUNK_BYTES = 16 * 1024
SIGKILL = 9
HARMLESS = frozenset({17, 18, 28})
"""SIGCHLD, SIGCONT, SIGWINCH: they end nothing."""


class World(Protocol):
    """What all processes of a guest share: whether they stand still."""

    @property
    def frozen(self) -> bool:
        """Nothing moves."""
        ...


class Reader:
    """A stream that somebody is attached with. `position`: output bytes that have gone out on it, or before it."""

    def __init__(self, position: int, *, observes: bool) -> None:
        self.position = position
        self.observes = observes
        self.taken_over = False
        self.scope = trio.CancelScope()


class FakeProcess:
    """One process; `run` runs its program, which calls `read` and `write`."""

    def __init__(self, table: World, pid: int, body: Body) -> None:
        pty = body.get("pty")
        self.pid = pid
        self.body = body
        self.tag: str = body.get("tag", "")
        self.pty = pty is not None
        self.size: tuple[int, int] | None = (pty["cols"], pty["rows"]) if pty else None
        self.detached = bool(body.get("detach") or body.get("background")) or self.pty
        self.background = self.detached
        self.started_ns = time.time_ns()
        self.reply: Body | None = None
        self.ended_at = 0.0
        self.total = 0
        self._start = 0
        self._chunks: deque[tuple[int, bytes]] = deque()
        self._input = bytearray()
        self._input_ended = not (body.get("stdin") or self.pty)
        self._attached: Reader | None = None
        self._table = table
        self._changed = trio.Event()
        self._scope = trio.CancelScope()
        self._killed_by = 0
        self._pending: list[int] = []

    # what its program does

    async def read(self) -> bytes:
        """What was sent to it; empty when its input has ended."""
        while self._table.frozen or not (self._input or self._input_ended):
            await self._changed.wait()
        data = bytes(self._input)
        self._input.clear()
        self.changed()
        await trio.lowlevel.checkpoint()
        return data

    async def write(self, data: bytes, channel: int = STDOUT_CHANNEL) -> None:
        """Output. Waits for whoever is attached, for nobody else."""
        for begin in range(0, len(data), CHUNK_BYTES):
            piece = data[begin : begin + CHUNK_BYTES]
            while self._table.frozen or not self._fits(len(piece)):
                await self._changed.wait()
            self._chunks.append((channel, piece))
            self.total += len(piece)
            self._drop_oldest()
            self.changed()
            await trio.lowlevel.checkpoint()

    async def wait_resized(self) -> tuple[int, int]:
        """Its terminal's next size."""
        before = self.size
        while self._table.frozen or self.size == before or self.size is None:
            await self._changed.wait()
        return self.size

    async def run(self, program: LiveProgram) -> None:
        """To its end, which is kept."""
        began, code, timed_out = trio.current_time(), 0, False
        timeout = self.body.get("timeout_ms", 0) / 1000
        with self._scope:
            while self._table.frozen:
                await self._changed.wait()
            with trio.move_on_after(timeout or float("inf")) as limit:
                code = await program(self)
            timed_out = limit.cancelled_caught
        signal = SIGKILL if timed_out else self._killed_by
        reply: Body = {"exit_code": 128 + signal if signal else code}
        if signal:
            reply["signal"] = signal
        duration_ms = round((trio.current_time() - began) * 1000)
        self.reply = reply | {"duration_ms": duration_ms, "timed_out": timed_out}
        self.ended_at = trio.current_time()
        self.changed()

    # what is done to it

    def signal(self, number: int) -> None:
        """Frozen, only SIGKILL acts at once."""
        if self._table.frozen and number != SIGKILL:
            self._pending.append(number)
        elif number not in HARMLESS and self.reply is None:
            self._killed_by = number
            self._scope.cancel()

    def resize(self, cols: int, rows: int) -> None:
        """Of its terminal."""
        self.size = (cols, rows)
        self.changed()

    def changed(self) -> None:
        """Wake everybody who waits for something here."""
        if not self._table.frozen:
            while self._pending:
                self.signal(self._pending.pop(0))
        self._changed.set()
        self._changed = trio.Event()

    async def serve(self, stream: ServedStream, reader: Reader) -> Body:
        """Until it has ended, or somebody else takes over; an owner who goes away takes it with him, or detaches."""
        if not reader.observes:
            if self._attached is not None:
                self._attached.taken_over = True
                self._attached.scope.cancel()
            self._attached = reader
            self.changed()
        try:
            with reader.scope:
                return await self._converse(stream, reader)
        finally:
            if self._attached is reader:
                self._attached = None
                self.changed()
                if not self.detached:
                    self.signal(SIGKILL)
        raise Fault(FaultCode.CONFLICT, "somebody else has attached", details={"taken_over": True})

    def reader(self, offset: int | None, *, observes: bool) -> tuple[Reader, int]:
        """Where a replay begins, and how much of what was asked for is lost."""
        begin = self._start if offset is None else max(self._start, min(offset, self.total))
        return Reader(begin, observes=observes), max(0, begin - offset) if offset is not None else 0

    async def _converse(self, stream: ServedStream, reader: Reader) -> Body:
        async with trio.open_nursery() as nursery:
            if not reader.observes:
                nursery.start_soon(self._take_input, stream)
            while True:
                if reader.position < self._start:
                    lost, reader.position = self._start - reader.position, self._start
                    await stream.send(msgspec.msgpack.encode({"skipped": lost}), NOTICE_CHANNEL)
                elif reader.position < self.total:
                    channel, data = self._at(reader.position)
                    await stream.send(data, channel)
                    reader.position += len(data)
                    self.changed()
                elif self.reply is None:
                    await self._changed.wait()
                else:
                    break
            nursery.cancel_scope.cancel()
        return self.reply

    async def _take_input(self, stream: ServedStream) -> None:
        async for _, data in stream:
            while len(self._input) >= PIPE_BYTES:
                await self._changed.wait()
            if not self._input_ended:
                self._input += data
                self.changed()
        if not self.pty:
            self._input_ended = True
            self.changed()

    def _fits(self, size: int) -> bool:
        return self._attached is None or self.total + size - self._attached.position <= RING_BYTES

    def _drop_oldest(self) -> None:
        while (over := self.total - self._start - RING_BYTES) > 0:
            channel, data = self._chunks.popleft()
            if len(data) > over:
                self._chunks.appendleft((channel, data[over:]))
            self._start += min(over, len(data))

    def _at(self, position: int) -> tuple[int, bytes]:
        begin = self._start
        for channel, data in self._chunks:
            if position < begin + len(data):
                return channel, data[position - begin :]
            begin += len(data)
        raise AssertionError("beyond the ring")
