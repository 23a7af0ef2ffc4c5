"""Terminals over a WebSocket, which outlive it: a lost connection need not be the end."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

import trio
from msgspec import Struct

from capsule.client.answers import ExitStatus, Reconnection
from capsule.client.errors import ApiError, CapsuleError, Conflict, ConnectionLost, NotFound, StreamClosed
from capsule.client.nurseries import background
from capsule.client.sockets import PIECE, Socket, converted, open_socket
from capsule.client.transport import Transport, backoff, given

ATTEMPTS = 12
"""Reconnections in a row that fail; with their pauses about a minute, without the time that each of them takes."""

OPENING_ATTEMPTS = 4
"""To open one, also without `reconnect`."""

PASSING = frozenset({1001, 1011, 1012, 1013, 4502, 4503, 4504})
"""Closes that say: the server or the sandbox's host goes away for now."""

PASSING_STATUSES = frozenset({502, 503, 504})
"""The same before the upgrade; 502 and 504 are a proxy's, whose server starts anew."""

Tell = Callable[[Reconnection], None]


class Terminal:
    """A terminal that you are attached to: `async for data in terminal` (bytes), `send`, `resize`, `wait`.

    One task reads, any task may send. While nobody reads, nothing is fetched, and the program waits. With `reconnect`,
    input that was on its way when the connection was lost may be lost, but comes never twice.

    One that was started without a tag gets one of our own making, which no other has: when the connection is lost
    before the server answers, it is asked for by that, and started anew if it is not there: no shell is left behind
    that nobody knows.

    `tag`, `pid`: its names. `received`: bytes of output, from its beginning, that you have had; give it to
    `terminal_attach` as `offset`. `skipped`: bytes that you asked for and that were kept no more. `exit`: how it ended.
    """

    def __init__(
        self, transport: Transport, sandbox: str, first: Mapping[str, Any], *, reconnect: bool, tell: Tell | None
    ) -> None:
        self._transport = transport
        self._path = f"{sandbox}/pty"
        self._first = dict(first)
        self._own = first["type"] == "start" and "tag" not in first
        if self._own:
            self._first["tag"] = f"pty-{secrets.token_hex(4)}"
        self._start = self._first
        self._asked = False
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
                except (ConnectionLost, StreamClosed, ApiError) as exc:
                    failures += 1
                    if not (self._worth_another(exc, failures) if self.tag else self._opens_yet(exc, failures)):
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
        self._asked = True
        await socket.send_json(self._first)
        said = converted(await socket.expect("started"), _Started)
        self.pid = said.pid
        self.skipped += said.skipped
        if not self.tag:
            self._arrived = self.received = said.offset
            self.tag = said.tag
            started()
        else:
            self.received += said.offset - self._arrived
            self._arrived = said.offset
            if self._tell is not None:
                self._tell(Reconnection(attempts=failures, skipped=said.skipped))
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
                    self.exit = converted(message, ExitStatus)
        finally:
            self._gone(socket)
            self._first = {"type": "connect", **given(tag=self.tag, offset=self._arrived), **self._size()}

    def _size(self) -> dict[str, Any]:
        return {name: self._first[name] for name in ("cols", "rows") if name in self._first}

    def _worth_another(self, exc: CapsuleError, failures: int) -> bool:
        return self._reconnect and _passes(exc) and failures < ATTEMPTS

    def _opens_yet(self, exc: CapsuleError, failures: int) -> bool:
        """Whether to go on after a failure before it has begun: by connecting, if it may run, or starting it again."""
        if not self._own or not self._asked or failures >= (ATTEMPTS if self._reconnect else OPENING_ATTEMPTS):
            return False
        connecting = self._first is not self._start
        there = not connecting and failures > 1 and type(exc) is Conflict  # the first start got through after all
        if there or _passes(exc):
            self._first = {"type": "connect", "tag": self._start["tag"], "offset": 0, **self._size()}
            return True
        self._first = self._start
        return connecting and isinstance(exc, NotFound)


class _Started(Struct):
    tag: str
    pid: int = 0
    offset: int = 0
    skipped: int = 0


def _passes(exc: CapsuleError) -> bool:
    if isinstance(exc, ApiError):
        return exc.status in PASSING_STATUSES
    return not isinstance(exc, StreamClosed) or exc.code in PASSING


@asynccontextmanager
async def opened(
    transport: Transport, sandbox: str, first: Mapping[str, Any], *, reconnect: bool, on_reconnect: Tell | None
) -> AsyncIterator[Terminal]:
    """A terminal: started or connected to, as the message `first` says."""
    terminal = Terminal(transport, sandbox, first, reconnect=reconnect, tell=on_reconnect)
    async with background() as nursery:
        await nursery.start(terminal.run)
        yield terminal
