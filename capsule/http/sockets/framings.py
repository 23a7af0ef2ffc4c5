"""How a process's bytes travel in messages: four ways, which the client chooses between."""

from __future__ import annotations

from typing import Protocol

from capsule.errors import InvalidRequest
from capsule.http.sockets.ends import UnexpectedFrame
from capsule.http.sockets.messages import Framing, Output, Stderr, Stdout
from capsule.http.sockets.utf8 import Utf8Cutter
from capsule.http.sockets.websocket import WebSocket

STDIN, STDOUT, STDERR = 0, 1, 2
"""First byte of a binary message of a console."""


class ProcessFraming(Protocol):
    """Output to messages, binary messages to input."""

    async def show(self, channel: int, data: bytes, /) -> None:
        """Send output."""
        ...

    async def end(self) -> None:
        """Send what waits for more output, of which there is none."""
        ...

    def typed(self, data: bytes, /) -> bytes:
        """The input in a binary message. UnexpectedFrame, InvalidRequest."""
        ...


def framing_of(socket: WebSocket, framing: Framing, *, terminal: bool) -> ProcessFraming:
    """The one for what the client asked for."""
    if terminal:
        return TerminalBytes(socket) if framing == "binary" else TerminalJson(socket)
    return ConsoleBytes(socket) if framing == "binary" else ConsoleJson(socket)


class ConsoleJson:
    """`stdout` and `stderr` messages, text where it is text."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._cutters = {STDOUT: Utf8Cutter(), STDERR: Utf8Cutter()}

    async def show(self, channel: int, data: bytes) -> None:
        await self._send(channel, self._cutters[channel].feed(data))

    async def end(self) -> None:
        for channel, cutter in self._cutters.items():
            await self._send(channel, cutter.end())

    def typed(self, _data: bytes) -> bytes:
        raise UnexpectedFrame

    async def _send(self, channel: int, pieces: list[str | bytes]) -> None:
        kind = Stdout if channel == STDOUT else Stderr
        for piece in pieces:
            await self._socket.send(kind(data=piece) if isinstance(piece, str) else kind(data_b64=piece))


class ConsoleBytes:
    """Binary messages; the first byte says which stream."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def show(self, channel: int, data: bytes) -> None:
        await self._socket.send_bytes(bytes((channel,)) + data)

    async def end(self) -> None:
        """Nothing waits."""

    def typed(self, data: bytes) -> bytes:
        if data[:1] != bytes((STDIN,)):
            raise InvalidRequest("The first byte of a binary message says which stream it is for: 0, the input.")
        return data[1:]


class TerminalBytes:
    """Binary messages with nothing but the terminal's bytes."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def show(self, _channel: int, data: bytes) -> None:
        await self._socket.send_bytes(data)

    async def end(self) -> None:
        """Nothing waits."""

    def typed(self, data: bytes) -> bytes:
        return data


class TerminalJson:
    """`output` messages in base64, for clients that have no binary ones."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def show(self, _channel: int, data: bytes) -> None:
        await self._socket.send(Output(data=data))

    async def end(self) -> None:
        """Nothing waits."""

    def typed(self, _data: bytes) -> bytes:
        raise UnexpectedFrame
