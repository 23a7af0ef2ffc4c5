"""A QMP client: QEMU's control protocol, JSON lines on a unix socket.

QEMU serves one client per socket at a time, so connections are short: open, ask, close. Whatever QEMU sends is
bounded, and every command has a deadline: a hung QEMU costs the caller a QmpTimeout, never a hang.
"""

from __future__ import annotations

import array
import itertools
import os
import socket
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from agent.vmm.driver import VmmError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

MAX_LINE_BYTES = 1024 * 1024
"""The longest answer we ask for is a console of 64 KiB in base64."""

RECEIVE_BYTES = 64 * 1024


class QmpError(VmmError):
    """Base of what goes wrong between us and QEMU's control socket; never raised itself."""


class QmpUnreachable(QmpError):  # noqa: N818 - says what happened
    """The socket cannot be connected, or QEMU closed it."""


class QmpTimeout(QmpError):  # noqa: N818 - says what happened
    """QEMU did not answer in time."""


class QmpRefused(QmpError):  # noqa: N818 - says what happened
    """QEMU answered that the command failed; `kind` is QEMU's error class."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.kind = kind


class QmpViolation(QmpError):  # noqa: N818 - says what happened
    """What came is not QMP."""


class Failure(msgspec.Struct, frozen=True, rename={"kind": "class", "description": "desc"}):
    kind: str
    description: str


class Line(msgspec.Struct, frozen=True, rename={"greeting": "QMP", "value": "return"}):
    """Any line QEMU sends: a greeting, an answer (value or error, with our id) or an event."""

    greeting: dict[str, Any] | None = None
    value: Any = msgspec.UNSET
    error: Failure | None = None
    id: int | None = None
    event: str | None = None
    data: dict[str, Any] = {}  # msgspec copies mutable defaults


class QmpClient:
    """One connection. For one task at a time; after any failure but QmpRefused it is of no further use."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = bytearray()
        self._searched = 0
        self._ids = itertools.count(1)

    async def execute(self, command: str, *, timeout: float, **arguments: object) -> Any:  # noqa: ASYNC109 - raises ours
        """Send a command and return its result. Raises QmpError; `timeout` in seconds, for both ways."""
        return await self._execute(command, arguments, timeout=timeout)

    async def _execute(
        self,
        command: str,
        arguments: dict[str, object],
        *,
        timeout: float,  # noqa: ASYNC109 - raises ours
        descriptor: int | None = None,
    ) -> Any:
        number = next(self._ids)
        request = {"execute": command, "arguments": arguments, "id": number}
        with _within(timeout, command), _connection_failures():
            await self._send(msgspec.json.encode(request) + b"\n", descriptor)
            while (line := _decode(await self._receive_line())).id != number:
                pass  # events, and nothing else: they are for wait_event's connection
        if line.error is not None:
            raise QmpRefused(command, line.error.kind, line.error.description)
        return line.value

    async def _send(self, request: bytes, descriptor: int | None) -> None:
        sent = 0
        if descriptor is not None:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
            sent = await self._stream.socket.sendmsg([request], [rights])
        await self._stream.send_all(request[sent:])

    async def give(self, name: str, descriptor: int, *, timeout: float) -> None:  # noqa: ASYNC109 - raises ours
        """Hand a descriptor to QEMU, which calls it `name` from now on. Ours stays ours. Raises QmpError."""
        await self._execute("getfd", {"fdname": name}, timeout=timeout, descriptor=descriptor)

    async def wait_event(self, name: str) -> dict[str, Any]:
        """Wait for an event, without a deadline, and return its data.

        A guest can make QEMU send other events as fast as it likes; they are thrown away without being parsed.
        """
        needle = f'"{name}"'.encode()
        with _connection_failures():
            while True:
                text = await self._receive_line()
                if needle in text and (line := _decode(text)).event == name:
                    return line.data

    async def negotiate(self, *, timeout: float) -> None:  # noqa: ASYNC109 - raises ours
        """Take the greeting and leave negotiation mode: commands are answered from here on."""
        with _within(timeout, "greeting"), _connection_failures():
            if _decode(await self._receive_line()).greeting is None:
                raise QmpViolation("QEMU did not greet")
        await self.execute("qmp_capabilities", timeout=timeout)

    async def _receive_line(self) -> bytes:
        while (end := self._received.find(b"\n", self._searched)) < 0:
            self._searched = len(self._received)
            if self._searched > MAX_LINE_BYTES:
                raise QmpViolation(f"QEMU sent a line of more than {MAX_LINE_BYTES} bytes")
            chunk = await self._stream.receive_some(RECEIVE_BYTES)
            if not chunk:
                raise QmpUnreachable("QEMU closed its control socket")
            self._received += chunk
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        return line


@asynccontextmanager
async def connect(directory: Path, name: str, *, timeout: float) -> AsyncIterator[QmpClient]:  # noqa: ASYNC109
    """Connect to socket `name` in `directory`; `timeout` seconds until QEMU executes commands. Raises QmpError."""
    with _within(timeout, "connect"), _connection_failures():
        stream = await _open(directory, name)
    async with stream:
        client = QmpClient(stream)
        await client.negotiate(timeout=timeout)
        yield client


async def _open(directory: Path, name: str) -> trio.SocketStream:
    # A socket's address holds 107 bytes; a state directory may be longer. Through /proc it is always short.
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return await trio.open_unix_socket(f"/proc/self/fd/{descriptor}/{name}")
    finally:
        os.close(descriptor)


def _decode(line: bytes) -> Line:
    try:
        return msgspec.json.decode(line, type=Line)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise QmpViolation(f"QEMU sent {line[:200]!r}: {error}") from error


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise QmpTimeout(f"QEMU did not answer {what} within {seconds:g} s")


@contextmanager
def _connection_failures() -> Iterator[None]:
    try:
        yield
    except (OSError, trio.BrokenResourceError) as error:
        raise QmpUnreachable(f"QEMU's control socket: {error}") from error
