"""Live processes: a command's input and output over a WebSocket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

from msgspec import Struct

from capsule.client.answers import Chunk, ExitStatus
from capsule.client.errors import CapsuleError
from capsule.client.sockets import PIECE, Socket, converted, open_socket
from capsule.client.transport import Transport, given, segment

STDIN = b"\x00"


class LiveProcess:
    """A process that you are attached to: `async for chunk in process`, `send`, `wait`.

    One task reads (iterates or waits), any task may send and signal. While nobody reads, nothing is fetched: the
    process waits when the buffers on the way (some 100 KiB) are full; it is never dropped or piled up here.

    `pid`, `tag`: its names. `terminal`: it has one; its output is all "stdout". `received`: bytes of output, from its
    beginning, that you have had; give it to `attach` as `offset`. `skipped`: bytes that you asked for and that are
    kept no more. `replay`: how many bytes had been written before you attached and come first; `ended`: and they are
    the last. `exit`: how it ended, when the output has been read to its end.
    """

    def __init__(self, transport: Transport, sandbox: str, socket: Socket, start: Mapping[str, Any]) -> None:
        self._transport = transport
        self._sandbox = sandbox
        self._socket = socket
        said = converted(start, _Start)
        self.pid = said.pid
        self.tag = said.tag
        self.terminal = said.pty
        self.received = said.offset
        self.skipped = said.skipped
        self.replay = said.replay
        self.ended = said.ended
        self.exit: ExitStatus | None = None

    def __repr__(self) -> str:
        return f"<LiveProcess {self.pid} {self.tag or ''}>"

    async def send(self, data: bytes) -> None:
        """Bytes for its input; waits as long as it does not read. ConnectionLost, StreamClosed.

        A send that is cancelled half-way breaks the stream: what was sent is not known."""
        head = b"" if self.terminal else STDIN
        for start in range(0, len(data), PIECE):
            await self._socket.send(head + data[start : start + PIECE])

    async def end(self) -> None:
        """Its input ends here."""
        await self._socket.send_json({"type": "close_stdin"})

    async def signal(self, signal: str | int = "SIGTERM") -> None:
        """To its process group. It overtakes input that waits; nothing happens to one that has ended."""
        if self._socket.sending:  # input that the process does not read: the socket is full
            await self._signal_aside(signal)
        else:
            await self._socket.send_json({"type": "signal", "signal": str(signal)})

    async def stop(self) -> None:
        """Kill it, also one that is detached."""
        if self._socket.sending:
            await self._signal_aside("SIGKILL")
        else:
            await self._socket.send_json({"type": "stop"})

    async def resize(self, cols: int, rows: int) -> None:
        """Of its terminal, if it has one."""
        await self._socket.send_json({"type": "resize", "cols": cols, "rows": rows})

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """The next piece of output, until the process has ended. StreamClosed, ConnectionLost."""
        while self.exit is None:
            chunk = self._understood(await self._socket.receive())
            if chunk is not None and chunk.data:
                self.received += len(chunk.data)
                return chunk
        raise StopAsyncIteration

    async def wait(self) -> ExitStatus:
        """How it ended. Output that has not been read is thrown away: iterate first to have it."""
        async for _ in self:
            pass
        if self.exit is None:
            raise CapsuleError("the process ended without saying how")
        return self.exit

    def _understood(self, message: bytes | dict[str, Any]) -> Chunk | None:
        if isinstance(message, bytes) and self.terminal:
            return Chunk("stdout", message)
        if isinstance(message, bytes):
            return Chunk("stderr" if message[:1] == b"\x02" else "stdout", message[1:])
        if message["type"] == "exit":
            self.exit = converted(message, ExitStatus)
        return None

    async def _signal_aside(self, signal: str | int) -> None:
        path = f"{self._sandbox}/processes/{self.pid}"
        await self._transport.send("DELETE", path, params={"signal": str(signal)})


class _Start(Struct):
    pid: int
    tag: str | None = None
    pty: bool = False
    offset: int = 0
    skipped: int = 0
    replay: int = 0
    ended: bool = False


@asynccontextmanager
async def started(transport: Transport, sandbox: str, start: Mapping[str, Any]) -> AsyncIterator[LiveProcess]:
    """Start a process with the fields of `start`."""
    async with open_socket(transport, f"{sandbox}/exec/stream") as socket:
        await socket.send_json({"type": "start", "framing": "binary", **start})
        yield LiveProcess(transport, sandbox, socket, await socket.expect("start"))


@asynccontextmanager
async def attached(
    transport: Transport, sandbox: str, process: int | str, *, offset: int | None, observe: bool
) -> AsyncIterator[LiveProcess]:
    """Attach to one."""
    params = given(framing="binary", offset=offset, observe="true" if observe else None)
    async with open_socket(transport, f"{sandbox}/processes/{segment(process)}/stream", params) as socket:
        yield LiveProcess(transport, sandbox, socket, await socket.expect("start"))
