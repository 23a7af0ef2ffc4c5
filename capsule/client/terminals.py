"""Terminals over a WebSocket, which outlive it: a lost connection need not be the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

import msgspec
import trio

from capsule.client.answers import ExitStatus, Reconnection
from capsule.client.errors import CapsuleError, ConnectionLost, StreamClosed, Unavailable
from capsule.client.nurseries import background
from capsule.client.sockets import PIECE, Socket, open_socket
from capsule.client.transport import Transport, backoff, given

ATTEMPTS = 12
"""Reconnections in a row that fail; with their pauses about a minute, without the time that each of them takes."""

PASSING = frozenset({1001, 1011, 1012, 1013, 4503})
"""Closes that say: the server or the sandbox's host goes away for now."""


Tell = Callable[[Reconnection], None]


class Terminal:
    """A terminal that you are attached to: `async for data in terminal` (bytes), `send`, `resize`, `wait`.

    One task reads, any task may send. While nobody reads, nothing is fetched, and the program waits. With `reconnect`,
    input that was on its way when the connection was lost may be lost, but comes never twice.

    `tag`, `pid`: its names. `received`: bytes of output, from its beginning, that you have had; give it to
    `terminal_attach` as `offset`. `skipped`: bytes that you asked for and that were kept no more. `exit`: how it ended.
    """

    def __init__(
        self, transport: Transport, sandbox: str, first: Mapping[str, Any], *, reconnect: bool, tell: Tell | None
    ) -> None:
        self._transport = transport
        self._path = f"{sandbox}/pty"
        self._first = dict(first)
        self._reconnect = reconnect
        self._tell = tell
        self._socket: Socket | None = None
        self._connected = trio.Event()
        self._over: Exception | None = None
        self._arrived = 0
        self._write, self._read = trio.open_memory_channel[bytes](0)
        self.tag: str = ""
        self.pid: int = 0
        self.received = 0
        self.skipped = 0
        self.exit: ExitStatus | None = None

    def __repr__(self) -> str:
        return f"<Terminal {self.tag}>"

    async def send(self, data: bytes) -> None:
        """Bytes as from a keyboard; waits when the program does not read them, or until the connection is there again.
        StreamClosed, ConnectionLost."""
        for start in range(0, len(data), PIECE):
            socket = await self._current()
            try:
                await socket.send(bytes(data[start : start + PIECE]))
            except ConnectionLost:
                if not self._reconnect:
                    raise
                self._gone(socket)

    async def resize(self, cols: int, rows: int) -> None:
        """In characters, 1 to 4096 each. Of several in a row the last one counts; it holds for reconnections, too."""
        self._first.update(cols=cols, rows=rows)
        await self._control({"type": "resize", "cols": cols, "rows": rows})

    async def kill(self) -> None:
        """End the program in it."""
        await self._control({"type": "kill"})

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """The next piece of output, until the program has ended. StreamClosed, ConnectionLost."""
        try:
            data = await self._read.receive()
        except trio.EndOfChannel:
            if self.exit is None and self._over is not None:
                raise self._over from None
            raise StopAsyncIteration from None
        self.received += len(data)
        return data

    async def wait(self) -> ExitStatus:
        """How it ended. Output that has not been read is thrown away: iterate first to have it."""
        async for _ in self:
            pass
        if self.exit is None:
            raise CapsuleError("the terminal ended without saying how")
        return self.exit

    async def _control(self, message: Mapping[str, Any]) -> None:
        """A control message; when the connection is lost under it, on the next one."""
        while True:
            socket = await self._current()
            try:
                return await socket.send_json(message)
            except ConnectionLost:
                if not self._reconnect:
                    raise
            self._gone(socket)

    async def _current(self) -> Socket:
        """The socket that is open, or will be."""
        while self._socket is None:
            if self._over is not None:
                raise self._over
            await self._connected.wait()
        return self._socket

    def _gone(self, socket: Socket) -> None:
        if self._socket is socket:
            self._socket, self._connected = None, trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Be connected, and again when that is lost, until the program has ended. Failures before it has begun are
        raised, later ones go to whoever reads or sends."""
        failures = 0
        try:
            while True:
                try:
                    async with open_socket(self._transport, self._path) as socket:
                        await self._begin(socket, failures, task_status.started)
                        failures = 0
                        await self._pump(socket)
                    break
                except (ConnectionLost, StreamClosed, Unavailable) as exc:
                    failures += 1
                    if not self.tag or not self._worth_another(exc, failures):
                        raise
                await trio.sleep(backoff(failures))
            self._over = StreamClosed(1000, "the program in the terminal has ended")
        except CapsuleError as exc:
            self._over = exc
            if not self.tag:
                raise
        finally:
            self._socket = None
            self._connected.set()
            self._write.close()

    async def _begin(self, socket: Socket, failures: int, started: Callable[[], None]) -> None:
        """Start, or connect; `failures` came before this."""
        await socket.send_json(self._first)
        said = await socket.expect("started")
        offset, skipped = said.get("offset", 0), said.get("skipped", 0)
        self.pid = said.get("pid", 0)
        self.skipped += skipped
        if not self.tag:
            self._arrived = self.received = offset
            self.tag = said["tag"]
            started()
        else:
            self.received += offset - self._arrived
            self._arrived = offset
            if self._tell is not None:
                self._tell(Reconnection(attempts=failures, skipped=skipped))
        self._socket = socket
        self._connected.set()

    async def _pump(self, socket: Socket) -> None:
        """Output, one piece at a time, to whoever reads; until the program has ended."""
        try:
            while self.exit is None:
                message = await socket.receive()
                if isinstance(message, bytes):
                    self._arrived += len(message)
                    await self._write.send(message)
                elif message["type"] == "exit":
                    self.exit = msgspec.convert(message, ExitStatus)
        finally:
            self._gone(socket)
            self._first = {"type": "connect", **given(tag=self.tag, offset=self._arrived), **self._size()}

    def _size(self) -> dict[str, Any]:
        return {name: self._first[name] for name in ("cols", "rows") if name in self._first}

    def _worth_another(self, exc: CapsuleError, failures: int) -> bool:
        passing = not isinstance(exc, StreamClosed) or exc.code in PASSING
        return self._reconnect and passing and failures < ATTEMPTS


@asynccontextmanager
async def opened(
    transport: Transport, sandbox: str, first: Mapping[str, Any], *, reconnect: bool, on_reconnect: Tell | None
) -> AsyncIterator[Terminal]:
    """A terminal: started or connected to, as the message `first` says."""
    terminal = Terminal(transport, sandbox, first, reconnect=reconnect, tell=on_reconnect)
    async with background() as nursery:
        await nursery.start(terminal.run)
        yield terminal
