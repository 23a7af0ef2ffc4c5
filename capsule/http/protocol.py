"""hypercorn's HTTP/1.1 protocol, with the few things it answers by itself put into our words."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, cast

import h11
from hypercorn.events import Closed
from hypercorn.protocol.events import Body, EndBody, Response
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from werkzeug.datastructures import Headers

from capsule.http.errors import error_body, error_headers, from_status
from capsule.http.sockets.handshake import UpgradeRequest, asks_for_websocket

if TYPE_CHECKING:
    from hypercorn.protocol.events import Event

REQUEST_ID = b"x-request-id"
"""On every answer of the application; one without it is hypercorn's own."""


class Http11(H11Protocol):
    """HTTP/1.1 only: an upgrade to clear-text HTTP/2 is ignored, as RFC 9110 allows. TLS and HTTP/2 are a proxy's.

    A request for a WebSocket is left in `upgrade`, and nothing more is read here: hypercorn's own WebSockets negotiate
    compression, do not say when they give a client up, and end without a close frame.
    """

    _refused = False
    upgrade: UpgradeRequest | None = None

    async def _check_protocol(self, event: h11.Request) -> None:
        """Where hypercorn looks for HTTP/2."""

    async def _create_stream(self, request: h11.Request) -> None:
        headers = Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers])
        if not asks_for_websocket(request.method.decode("ascii"), headers):
            await super()._create_stream(request)
            return
        read = cast("h11.Connection", self.connection)
        self.upgrade = UpgradeRequest(
            request.target.decode("ascii"), request.http_version.decode(), headers, bytes(read.trailing_data[0])
        )
        self.connection = cast("Any", _HandedOver())

    async def stream_send(self, event: Event) -> None:
        if self._refused:
            return  # the end of an answer that we gave already
        if isinstance(event, Response) and event.status_code >= 400 and not _has_request_id(event.headers):
            await self._refuse(event.status_code)
        else:
            await super().stream_send(event)

    async def _send_error_response(self, status_code: int) -> None:
        """h11 found the request malformed; what is left of it cannot be read."""
        await self._refuse(status_code if status_code < 500 else 400)  # h11 hints 501 for a coding it does not know

    async def _refuse(self, status: int) -> None:
        """Answer in our form and close."""
        self._refused = True
        error = from_status(status)
        request_id = secrets.token_hex(16)
        body = error_body(error, request_id)
        headers = {
            **error_headers(error),
            "Content-Length": str(len(body)),
            "Connection": "close",
            "X-Request-Id": request_id,
        }
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await super().stream_send(Response(stream_id=STREAM_ID, headers=raw, status_code=error.status))
        await super().stream_send(Body(stream_id=STREAM_ID, data=body))
        await super().stream_send(EndBody(stream_id=STREAM_ID))
        await self.send(Closed())


class _HandedOver:
    """In the place of an h11 connection whose bytes are somebody else's now."""

    our_state = None
    their_state = None
    they_are_waiting_for_100_continue = False

    def receive_data(self, _data: bytes) -> None:
        """Only the end of the connection comes here."""

    def next_event(self) -> type[h11.NEED_DATA]:
        return h11.NEED_DATA


def _has_request_id(headers: list[tuple[bytes, bytes]] | Any) -> bool:
    return any(name.lower() == REQUEST_ID for name, _ in headers)
