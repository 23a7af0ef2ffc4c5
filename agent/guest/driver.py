"""What a sandbox actor asks of its guest; kept by `client.GuestLink` and by the fake."""

from __future__ import annotations

import math
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from agent.actor.peer import OpenedStream


class Guest(Protocol):
    """A connection to one guest daemon, made again when it breaks."""

    async def run(self) -> None:
        """Keep the connection; until cancelled."""
        ...

    async def wait_connected(self, deadline: float) -> object:
        """Return once the guest daemon has answered. Fault `unavailable` at `deadline` (Trio time)."""
        ...

    async def call(self, method: str, body: dict[str, Any], *, timeout: float) -> dict[str, Any]:  # noqa: ASYNC109
        """One question, one answer. Raises Fault."""
        ...

    def open_stream(
        self, method: str, body: dict[str, Any], *, timeout: float = math.inf
    ) -> AbstractAsyncContextManager[OpenedStream]:
        """A question with bytes both ways. Raises Fault."""
        ...
