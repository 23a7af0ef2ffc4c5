"""The opening handshake (RFC 6455 §4.2): the request that asks for a WebSocket, and the answers to it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import unquote

from werkzeug.datastructures import Headers
from wsproto.handshake import WEBSOCKET_VERSION
from wsproto.utilities import generate_accept_token

from capsule.errors import CapsuleError, InvalidRequest, UpgradeRequired
from capsule.http.errors import error_body, error_headers

VERSION = WEBSOCKET_VERSION.decode()
"""The only one there ever was."""


@dataclass(frozen=True, slots=True)
class UpgradeRequest:
    """A GET that asks for a WebSocket. `target` as sent; `early`: bytes that came behind the head."""

    target: str
    http_version: str
    headers: Headers
    early: bytes = b""

    @property
    def path(self) -> str:
        """Decoded."""
        return unquote(self.target.partition("?")[0])

    @property
    def query_string(self) -> bytes:
        """As sent."""
        return self.target.partition("?")[2].encode("latin-1")

    def key(self) -> str:
        """Its Sec-WebSocket-Key. InvalidRequest, UpgradeRequired for a request that is no good handshake."""
        if self.http_version != "1.1" or not self.headers.get("Host"):
            raise InvalidRequest("A WebSocket is asked for with HTTP/1.1 and a Host header.")
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            raise InvalidRequest("A request for a WebSocket has no body.")
        keys = self.headers.getlist("Sec-WebSocket-Key")
        if len(keys) != 1 or not _is_key(keys[0]):
            raise InvalidRequest("Sec-WebSocket-Key must be 16 bytes in base64.")
        if self.headers.getlist("Sec-WebSocket-Version") != [VERSION]:
            raise UpgradeRequired(f"Sec-WebSocket-Version must be {VERSION}.")
        return str(keys[0])


def asks_for_websocket(method: str, headers: Headers) -> bool:
    """Whether a request is one: RFC 9110 §7.8 has tokens in both headers."""
    return (
        method == "GET" and "upgrade" in _tokens(headers, "Connection") and "websocket" in _tokens(headers, "Upgrade")
    )


def accepting(key: str, request_id: str) -> bytes:
    """The head of the answer that upgrades. No extensions, no subprotocols."""
    headers = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Accept": generate_accept_token(key.encode()).decode(),
        "X-Request-Id": request_id,
    }
    return _head(HTTPStatus.SWITCHING_PROTOCOLS, headers)


def refusing(error: CapsuleError, request_id: str) -> bytes:
    """The whole answer that does not; the connection closes behind it."""
    body = error_body(error, request_id)
    headers = {
        **error_headers(error),
        **(UPGRADE if isinstance(error, UpgradeRequired) else {}),
        "Content-Length": str(len(body)),
        "Connection": "close",
        "X-Request-Id": request_id,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return _head(HTTPStatus(error.status), headers) + body


UPGRADE = {"Upgrade": "websocket", "Sec-WebSocket-Version": VERSION}
"""What an answer 426 says should be asked for."""


def _head(status: HTTPStatus, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", f"Date: {formatdate(usegmt=True)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _is_key(text: str) -> bool:
    try:
        return len(base64.b64decode(text.strip(), validate=True)) == 16
    except (binascii.Error, ValueError):
        return False


def _tokens(headers: Headers, name: str) -> set[str]:
    return {token.strip().lower() for line in headers.getlist(name) for token in line.split(",")}
