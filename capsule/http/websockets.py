"""WebSocket upgrades: there is nothing to upgrade to yet, and a client hears so in our words."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from capsule.errors import NotFound
from capsule.http.errors import error_body, error_headers

if TYPE_CHECKING:
    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, WebsocketScope
    from quart import Quart


class RefusedWebsocket:
    """Answers every upgrade 404, before the handshake."""

    def __init__(self, app: Quart, scope: WebsocketScope) -> None:
        self.app = app
        self.scope = scope

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        await receive()
        error = NotFound("There is no WebSocket at this path; /docs lists what there is.")
        request_id = secrets.token_hex(16)
        body = error_body(error, request_id)
        headers = {**error_headers(error), "Content-Length": str(len(body)), "X-Request-Id": request_id}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "websocket.http.response.start", "status": error.status, "headers": raw})
        await send({"type": "websocket.http.response.body", "body": body, "more_body": False})
