"""WebSockets: one message at a time, in JSON or bytes, with the server's endings in our words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec
import trio
from trio_websocket import CloseReason, ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream

from capsule.client.dialing import dial
from capsule.client.errors import CapsuleError, ConnectionLost, StreamClosed, api_error, typed_error
from capsule.client.nurseries import background
from capsule.client.transport import Transport

PIECE = 64 * 1024
"""Bytes of input in one message."""

START_TIMEOUT = 60.0
"""Seconds for the server's first word: it asks the sandbox's host for it."""

CLOSE_TIMEOUT = 2.0
"""Seconds for a clean goodbye; after them the connection is cut, which means the same to the server."""

SILENCE = 95.0
"""Seconds: three pings that did not come."""

RECEIVE_BUFFER = 256 * 1024
"""Of a flood, one or two messages with their heads."""

_BEYOND_HTTP = 4000

T = TypeVar("T")


class Socket:
    """An open WebSocket. One task receives; any task sends. Nothing is read ahead but one message.

    Owns: nothing. Owned by: open_socket. Dies when: closed; then everything raises what the close frame said.
    """

    def __init__(self, connection: WebSocketConnection) -> None:
        self._connection = connection
        self._lock = trio.StrictFIFOLock()
        self._receiving = trio.Lock()
        self._refusal: str | None = None
        self._said = ""
        self._torn = False

    @property
    def sending(self) -> bool:
        """A message is on its way out: whatever is sent now comes after it."""
        return self._lock.locked()

    async def send(self, message: bytes | str) -> None:
        """One message; waits for room. StreamClosed, ConnectionLost."""
        async with self._lock:
            if self._torn:
                raise ConnectionLost("a message was cut off half-way; the stream cannot go on")
            self._torn = True
            try:
                await self._connection.send_message(message)
            except ConnectionClosed as exc:
                closing = exc.reason
            else:
                self._torn = False
                return
        raise self._ending(closing)

    async def send_json(self, message: Mapping[str, Any]) -> None:
        """One message of text."""
        await self.send(msgspec.json.encode(message).decode())

    async def receive(self) -> bytes | dict[str, Any]:
        """The next message: bytes, or a JSON object with a `type`. StreamClosed, ConnectionLost.

        trio.BusyResourceError for a second task that reads."""
        try:
            self._receiving.acquire_nowait()
        except trio.WouldBlock:
            raise trio.BusyResourceError("another task reads this stream") from None
        try:
            message = await self._connection.get_message()
        except ConnectionClosed as exc:
            closing = exc.reason
        else:
            return message if isinstance(message, bytes) else self._decoded(message)
        finally:
            self._receiving.release()
        raise self._ending(closing)

    async def expect(self, kind: str) -> dict[str, Any]:
        """The server's first word, of this type. ApiError, as for a request, when it refuses; ConnectionLost."""
        try:
            with trio.move_on_after(START_TIMEOUT):
                while True:
                    message = await self.receive()
                    if not isinstance(message, bytes) and message["type"] == kind:
                        return message
        except StreamClosed as exc:
            if exc.code < _BEYOND_HTTP or exc.error_code is None:
                raise
            raise typed_error(exc.code - _BEYOND_HTTP, exc.error_code, self._said or exc.reason) from None
        raise ConnectionLost(f"the server did not answer within {START_TIMEOUT:g} seconds")

    def _decoded(self, text: str) -> dict[str, Any]:
        try:
            message = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError as exc:
            raise CapsuleError(f"the server sent a message that is not JSON: {exc}") from exc
        if not isinstance(message.get("type"), str):
            raise CapsuleError("the server sent a message without a type")
        if message["type"] == "error":
            code = message.get("code")
            self._refusal = code if isinstance(code, str) else None
            self._said = str(message.get("data", ""))
        return message

    def _ending(self, closing: CloseReason | None) -> StreamClosed | ConnectionLost:
        """The close frame as an error. Without one (1006) the connection was lost."""
        if closing is None or closing.code in (1005, 1006):
            return ConnectionLost("the connection was lost")
        reason = closing.reason or ""
        code = self._refusal
        if code is None and closing.code >= _BEYOND_HTTP and ": " in reason:
            code = reason.partition(":")[0]
        return StreamClosed(closing.code, reason, code)


def converted(message: Any, kind: type[T]) -> T:
    """A message as what it should be. CapsuleError for one that is not."""
    try:
        return msgspec.convert(message, kind)
    except msgspec.ValidationError as exc:
        raise CapsuleError(f"the server sent a message that this version does not understand: {exc}") from exc


class WatchedStream(trio.abc.Stream):
    """A connection that says when it has ended, and ends when the server, which pings every 30 s, is silent."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.ended = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the stream below."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream below."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As the stream below; trio.BrokenResourceError after SILENCE."""
        data: bytes | bytearray = b""
        try:
            with trio.fail_after(SILENCE):
                data = await self._stream.receive_some(max_bytes)
        except trio.TooSlowError:
            raise trio.BrokenResourceError("the server is silent") from None
        finally:
            if not data:
                self.ended.set()
        return data

    async def aclose(self) -> None:
        """As the stream below."""
        self.ended.set()
        await self._stream.aclose()


@asynccontextmanager
async def open_socket(
    transport: Transport, path: str, params: Mapping[str, Any] | None = None
) -> AsyncIterator[Socket]:
    """A WebSocket at this path; leaving closes it, within CLOSE_TIMEOUT. ApiError when the server refuses it before the
    upgrade, ConnectionLost."""
    transport.check_credentials()
    stream = WatchedStream(await dial(transport.credentials.url, transport.tls))
    try:
        async with background() as nursery:
            connection = await _shake_hands(transport, nursery, stream, path, params or {})
            try:
                yield Socket(connection)
            finally:
                with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                    await connection.aclose()
    except ConnectionRejected as exc:
        headers = {name.decode("latin-1").lower(): text.decode("latin-1") for name, text in exc.headers}
        refusal = api_error(exc.status_code, headers, exc.body or b"")
    else:
        return
    finally:
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            await trio.aclose_forcefully(stream)
    raise refusal


async def _shake_hands(
    transport: Transport, nursery: trio.Nursery, stream: WatchedStream, path: str, params: Mapping[str, Any]
) -> WebSocketConnection:
    """The upgrade. The connection's reader runs in `nursery`; its ConnectionRejected comes from there."""
    url, headers = urlsplit(transport.credentials.url), transport.credentials.headers
    query = f"?{urlencode(params)}" if params else ""
    connection = None
    with trio.move_on_after(START_TIMEOUT) as patience:

        async def give_up() -> None:
            await stream.ended.wait()
            if connection is None:
                patience.cancel()

        nursery.start_soon(give_up)
        connection = await wrap_client_stream(
            nursery,
            stream,  # type: ignore[arg-type]  # any stream will do
            url.netloc,
            f"{url.path}{path}{query}",
            extra_headers=[(name.encode(), text.encode()) for name, text in headers.items()],
            receive_buffer_size=RECEIVE_BUFFER,
        )
    if connection is None:
        raise ConnectionLost("the server closed the connection, or was silent, instead of answering")
    return connection
