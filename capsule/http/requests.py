"""A request as our handlers see it: its id, its body as a bounded stream, and a stack for what lives until the answer
is sent. Quart's own body collects everything a client sends in memory; this one makes the client wait instead."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import trio
from quart_trio.wrappers import TrioRequest

from capsule.errors import InvalidRequest, RequestTimeout, TooLarge

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

JSON_BYTES = 1024 * 1024
"""Largest JSON body."""

CHUNK_TIMEOUT = 30.0
"""Seconds the next piece of a body may take: a client that stopped sending holds nothing longer."""

JSON_TIMEOUT = 60.0
"""Seconds a whole JSON body may take: a client that sends a byte every now and then is not served for ever."""

ID_FORM = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""A request id of the client's that we pass on: short, and harmless in logs and headers."""

KEY_FORM = re.compile(r"[\x21-\x7e]{1,255}")
"""An Idempotency-Key: visible ASCII."""


class RequestBody:
    """The body of one request, handed over piece by piece: `put` waits until the handler wants more, so a client
    that sends faster than we use it waits on its own socket.

    The connection's task puts, the handler iterates, once. What nobody reads is drained after the answer. `expected`:
    its length, where the client says it.
    """

    def __init__(self, expected: int | None = None, _maximum: int | None = None) -> None:
        self._send, self._receive = trio.open_memory_channel[bytes](0)
        self._expected = expected
        self._came = 0
        self.finished = False
        self._discarding = False
        self._drained = trio.Event()
        self._drain_until = 0

    @property
    def arrived(self) -> bool:
        """Whether all of it is here, read or not. A large one may be said to be still on its way when it is here."""
        return self.finished or (self._expected is not None and self._came >= self._expected)

    async def put(self, data: bytes) -> None:
        """Hand `data` to the handler, or drop it when nobody wants it any more."""
        self._came += len(data)
        if self._discarding:
            self._drain_until -= len(data)
            if self._drain_until <= 0:
                self._drained.set()
            return
        if not data:
            return
        try:
            await self._send.send(data)
        except trio.BrokenResourceError:
            return

    def end(self) -> None:
        """Nothing more comes."""
        self.finished = True
        self._drained.set()
        self._send.close()

    async def drain(self, limit: int) -> None:
        """Throw away what comes until the client has sent all of it, or `limit` more bytes."""
        self._discarding = True
        self._receive.close()
        if not self.finished:
            self._drain_until = limit
            self._drained = trio.Event()
            await self._drained.wait()

    def __aiter__(self) -> RequestBody:
        return self

    async def __anext__(self) -> bytes:
        """The next piece (1 byte to 256 KiB); RequestTimeout when none comes for CHUNK_TIMEOUT seconds."""
        with trio.move_on_after(CHUNK_TIMEOUT):
            try:
                return await self._receive.receive()
            except trio.EndOfChannel:
                raise StopAsyncIteration from None
        raise RequestTimeout(f"No byte of the body came for {CHUNK_TIMEOUT:.0f} seconds; send it again.")


class ApiRequest(TrioRequest):
    """Quart's request, with our body. `cleanup` is closed when the answer has been sent or given up. `client_address`:
    see capsule.http.client_address."""

    body_class = RequestBody  # type: ignore[assignment]
    body: RequestBody  # type: ignore[assignment]
    request_id: str
    client_address: str
    cleanup: AsyncExitStack

    async def json_bytes(self) -> bytes:
        """The whole body, at most JSON_BYTES; TooLarge, RequestTimeout."""
        if (self.content_length or 0) > JSON_BYTES:
            raise _too_large()
        data = bytearray()
        with trio.move_on_after(JSON_TIMEOUT):
            async for chunk in self.body:
                data += chunk
                if len(data) > JSON_BYTES:
                    raise _too_large()
            return bytes(data)
        raise RequestTimeout(f"The body did not arrive within {JSON_TIMEOUT:.0f} seconds; send it again.")

    def idempotency_key(self) -> str | None:
        """The Idempotency-Key, None without one; InvalidRequest for one that is not 1 to 255 visible characters."""
        key = self.single_header("Idempotency-Key")
        if key is not None and not KEY_FORM.fullmatch(key):
            raise InvalidRequest("Idempotency-Key must be 1 to 255 visible ASCII characters.", field="Idempotency-Key")
        return key

    def single_header(self, name: str) -> str | None:
        """A header that may be given once at most; InvalidRequest when it comes twice."""
        values: list[Any] = self.headers.getlist(name)
        if len(values) > 1:
            raise InvalidRequest(f"The header {name} must be given once.", field=name)
        return values[0] if values else None


def _too_large() -> TooLarge:
    return TooLarge(f"A JSON body may have at most {JSON_BYTES} bytes (1 MiB).", limit=JSON_BYTES)
