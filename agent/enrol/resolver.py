"""Look-ups of host names in threads of their own.

Trio looks names up in its default threads, which the sandboxes' work shares and can fill; a heartbeat that waits for
one of those is late for no reason of the network's.
"""

from __future__ import annotations

import socket
from typing import Any

import trio

LOOK_UPS = 8
"""At once. Those that were given up on count until the C library does so, too (`resolv.conf`: some 30 s): a name server
that is away takes at most this many threads."""


class OwnThreads(trio.abc.HostnameResolver):
    """The system's resolver behind a limiter that nobody else has."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(LOOK_UPS)

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,  # noqa: A002
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """As `socket.getaddrinfo`."""
        return await trio.to_thread.run_sync(
            socket.getaddrinfo, host, port, family, type, proto, flags, abandon_on_cancel=True, limiter=self._limiter
        )

    async def getnameinfo(self, sockaddr: tuple[Any, ...], flags: int) -> tuple[str, str]:
        """As `socket.getnameinfo`."""
        return await trio.to_thread.run_sync(
            socket.getnameinfo, sockaddr, flags, abandon_on_cancel=True, limiter=self._limiter
        )
