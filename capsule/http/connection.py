"""One HTTP request from first byte to last: quart-trio's connection, with what it lacks.

The request's body is fed with back-pressure; the answer is streamed without a time limit but never finished when it
broke; a body that the handler did not read is drained for a while, so that the client sees the answer instead of a
reset; every answer has a request id; every request is logged and counted once.
"""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import structlog
import trio
from quart_trio.asgi import TrioASGIHTTPConnection

from capsule.errors import CapsuleError, InvalidRequest
from capsule.http.errors import error_response, internal
from capsule.http.operations import StreamResponse
from capsule.http.requests import ID_FORM, ApiRequest
from capsule.http.streams import CLIENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope
    from quart_trio.wrappers import TrioResponse

    from capsule.http.app import Application
    from capsule.http.streams import ClientStream

DRAIN_BYTES = 256 * 1024 * 1024
"""How much of an unwanted body is thrown away after the answer was sent. A client that reads only after writing
everything (most do) would otherwise see a reset connection, not the answer."""

DRAIN_TIMEOUT = 30.0
"""Seconds for that."""

GLANCE_BYTES = 64 * 1024
"""How much of it is thrown away before the answer."""

GLANCE_TIMEOUT = 0.05
"""Seconds for that."""

CLOSE_TIMEOUT = 5.0
"""Seconds the server may take to notice that it has closed the connection."""

CLIENT_GONE = 499
"""Status in logs and metrics of a request whose client hung up before the answer (nginx's convention)."""

log = structlog.get_logger()


class BrokenAnswer(Exception):  # noqa: N818 - it is no error of ours
    """An answer that had begun cannot be completed; the connection must break."""


class ApiConnection(TrioASGIHTTPConnection):
    """Owns one request's two tasks: `handle_messages` feeds the body, `handle_request` makes and sends the answer.

    Owned by: hypercorn's task for this request. Dies when the answer was sent, or the client hung up: then the
    handler is cancelled at its next checkpoint.
    """

    app: Application

    def __init__(self, app: Application, scope: HTTPScope) -> None:
        super().__init__(app, scope)
        self.request_id = _request_id(scope)
        self.route = "unmatched"
        self.status = CLIENT_GONE
        self._closing = False

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        structlog.contextvars.bind_contextvars(request_id=self.request_id)
        started = trio.current_time()
        target = _path(self.scope)
        self.scope = {**self.scope, "path": target or "/"}
        request: ApiRequest = self._create_request_from_scope(send)  # type: ignore[assignment]
        request.request_id = self.request_id
        request.client_address = self.app.addresses.of(self.scope)
        if not request.content_length and "Transfer-Encoding" not in request.headers:
            request.body.end()
        with self.app.metrics.in_flight.track_inprogress():
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.handle_messages, nursery, request, receive)
                    nursery.start_soon(self._answer, nursery, request, send, _flaw(request, target))
            finally:
                self._record(trio.current_time() - started)

    async def handle_messages(  # type: ignore[override]
        self, nursery: trio.Nursery, request: ApiRequest, receive: ASGIReceiveCallable
    ) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.request":
                await request.body.put(message.get("body", b""))
                if not message.get("more_body", False):
                    request.body.end()
            elif message["type"] == "http.disconnect":
                # hypercorn says this too when it has taken our last byte. Cancelling then would catch it between
                # two steps of its own (starting the idle timer), and the connection would stay open for ever.
                if not self._closing:
                    nursery.cancel_scope.cancel()
                request.body.end()
                return

    async def _answer(self, nursery: trio.Nursery, request: ApiRequest, send: ASGISendCallable, flaw: str) -> None:
        try:
            async with AsyncExitStack() as stack:
                request.cleanup = stack
                response = await self._respond(request, flaw)
                await self._send_answer(request, response, send)
        except Exception as err:
            # After the first byte there is no other way to say that it failed: hypercorn closes the connection of an
            # answer without an end.
            if reasons := _expected(err):
                log.warning("answer_broken_off", reasons=reasons)
            else:
                log.exception("answer_failed")
        else:
            await self._finish(request, send)
        nursery.cancel_scope.cancel()

    async def _respond(self, request: ApiRequest, flaw: str) -> TrioResponse:
        if flaw:
            response = error_response(InvalidRequest(flaw), self.request_id)
            response.headers["Connection"] = "close"
            return response
        try:
            response = cast("TrioResponse", await self.app.handle_request(request))
        except Exception:
            log.exception("request_failed")
            response = error_response(internal(), self.request_id)
        finally:
            if request.url_rule is not None:
                self.route = self.app.routes.get(request.url_rule.endpoint, self.route)
        return response

    async def _send_answer(self, request: ApiRequest, response: TrioResponse, send: ASGISendCallable) -> None:
        response.headers["X-Request-Id"] = self.request_id
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.setdefault("Cache-Control", "no-store")
        if not request.body.finished:
            # Most refusals come before the body was read, and most bodies are small: then the connection can stay.
            with trio.move_on_after(GLANCE_TIMEOUT):
                await request.body.drain(GLANCE_BYTES)
        if not request.body.finished:
            response.headers["Connection"] = "close"
        self.status = response.status_code
        headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in response.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        if isinstance(response, StreamResponse):
            with self._patience(response.patience):
                await self._send_stream(response, send)
        elif data := await response.get_data(as_text=False):
            await send({"type": "http.response.body", "body": data, "more_body": True})

    @contextmanager
    def _patience(self, seconds: float | None) -> Iterator[None]:
        """How long the client may take for a piece of the answer, for this answer alone."""
        client: ClientStream | None = cast("dict[str, Any]", self.scope.get("state", {})).get(CLIENT)
        if client is None or seconds is None:
            yield
            return
        client.patience = seconds
        try:
            yield
        finally:
            client.patience = None

    async def _send_stream(self, response: StreamResponse, send: ASGISendCallable) -> None:
        sent = 0
        async for chunk in response.chunks:
            sent += len(chunk)
            if response.size is not None and sent > response.size:
                raise BrokenAnswer(f"the source gave more than the {response.size} bytes announced")
            if chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if response.size is not None and sent < response.size:
            raise BrokenAnswer(f"the source gave {sent} of the {response.size} bytes announced")

    async def _finish(self, request: ApiRequest, send: ASGISendCallable) -> None:
        """Drain what the handler did not read, then end the answer (which ends or recycles the connection)."""
        if not request.body.finished:
            with trio.move_on_after(DRAIN_TIMEOUT):
                await request.body.drain(DRAIN_BYTES)
        self._closing = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if not request.body.finished:
            # The server may be waiting to hand over one more piece: be there until it says that the client is gone.
            with trio.move_on_after(CLOSE_TIMEOUT):
                await request.body.drain(DRAIN_BYTES)

    def _record(self, seconds: float) -> None:
        method = self.scope["method"]
        self.app.metrics.observe(method, self.route, self.status, seconds)
        log.info(
            "http_request",
            method=method,
            route=self.route,
            status=self.status,
            duration_ms=round(seconds * 1000, 3),
        )


def _expected(error: Exception) -> list[str]:
    """What broke a stream, when all of it is failures that we know; none for a bug. A source with a nursery of its
    own wraps what passes through it in groups."""
    if isinstance(error, ExceptionGroup):
        inner = [_expected(leaf) for leaf in error.exceptions]
        return list(chain.from_iterable(inner)) if all(inner) else []
    return [str(error)] if isinstance(error, BrokenAnswer | CapsuleError) else []


def _request_id(scope: HTTPScope) -> str:
    """The client's request id when it is harmless, else one of ours."""
    for name, value in scope["headers"]:
        if name.lower() == b"x-request-id":
            text = value.decode("latin-1")
            return text if ID_FORM.fullmatch(text) else secrets.token_hex(16)
    return secrets.token_hex(16)


def _flaw(request: ApiRequest, target: str | None) -> str:
    """What is wrong with a request that the protocol allows and we do not; empty for none."""
    if target is None:
        return "The request target must be a path or an http URL."
    if "Transfer-Encoding" in request.headers and "Content-Length" in request.headers:
        # A proxy before us may have believed the other one: the way requests are smuggled.
        return "Content-Length and Transfer-Encoding exclude each other."
    return ""


def _path(scope: HTTPScope) -> str | None:
    """The decoded path of the request's target (`/path` or `http://host/path`), None when it has none."""
    if scope["path"].startswith("/"):
        return scope["path"]
    scheme, separator, rest = scope["raw_path"].decode("latin-1").partition("://")
    if not separator or scheme.lower() not in {"http", "https"}:
        return None
    return unquote("/" + rest.partition("/")[2])
