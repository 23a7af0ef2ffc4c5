"""Which web pages may open a WebSocket here. Browsers ask nobody before they connect anywhere, and say in the Origin
header (RFC 6454) whose page it is; who sends none is no browser."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine, for who runs everything on one."""

DEFAULT_PORTS = {"http": 80, "https": 443}

Origin = tuple[str, str, int]
"""Scheme, host in lower case, port."""


@dataclass(frozen=True, slots=True)
class OriginRule:
    """`allowed`: origins like `https://app.example`. `same_host`: also whichever host the request was sent to - for a
    server that was not told its own name. A page of another site gets no credential of ours by itself."""

    allowed: frozenset[Origin] = frozenset()
    same_host: bool = True

    @classmethod
    def of(cls, origins: Iterable[str], *, same_host: bool) -> OriginRule:
        """From texts; ValueError names one that is no origin."""
        return cls(frozenset(parse_origin(text) for text in origins), same_host)

    def admits(self, sent: list[str], host: str) -> bool:
        """Whether a request with these Origin headers and this Host header may be upgraded."""
        if not sent:
            return True
        if len(sent) > 1:
            return False
        try:
            origin = parse_origin(sent[0])
        except ValueError:
            return False
        return origin in self.allowed or (self.same_host and _names(origin, host))


def parse_origin(text: str) -> Origin:
    """`https://host` or `http://host:port`, nothing behind it; ValueError for what is not (such as `null`). The names
    of the loopback are one."""
    parts = urlsplit(text.strip())
    port = parts.port
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.netloc.rpartition("@")[1]:
        raise ValueError(f"{text!r} is not like https://app.example or http://localhost:3000")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ValueError(f"{text!r} has more than scheme, host and port")
    return parts.scheme, _host(parts.hostname), DEFAULT_PORTS[parts.scheme] if port is None else port


def _host(name: str) -> str:
    return "localhost" if name.lower() in LOOPBACK else name.lower()


def _names(origin: Origin, host: str) -> bool:
    """Whether a Host header names the origin's host and port; behind a proxy we do not know the scheme."""
    try:
        return parse_origin(f"{origin[0]}://{host}") == origin
    except ValueError:
        return False
