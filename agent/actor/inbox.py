"""Received DATA of one stream, waiting to be read; reading it is what grants the sender more credit."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

from agent.wire.limits import INITIAL_CREDIT

if TYPE_CHECKING:
    from agent.wire.link import Link

GRANT_AT_BYTES = INITIAL_CREDIT // 4
"""Consumed bytes that are worth a CREDIT frame."""


class Inbox:
    """Chunks of one stream. Bounded by the credit that the link enforces."""

    __slots__ = ("_chunks", "_consumed", "_link", "_stream", "_waiting", "finished")

    def __init__(self, link: Link, stream: int) -> None:
        self.finished = False
        self._link = link
        self._stream = stream
        self._chunks: deque[tuple[int, bytes]] = deque()
        self._consumed = 0
        self._waiting: trio.Event | None = None

    def put(self, channel: int, data: bytes) -> None:
        """A chunk arrived."""
        self._chunks.append((channel, data))
        self._wake()

    def finish(self) -> None:
        """Nothing more will arrive."""
        self.finished = True
        self._wake()

    def discard(self) -> None:
        """Nobody reads any more."""
        self._chunks.clear()

    async def get(self) -> tuple[int, bytes] | None:
        """The next chunk as (channel, bytes), None after the last. One reader at a time."""
        while not self._chunks:
            if self.finished:
                return None
            self._waiting = trio.Event()
            await self._waiting.wait()
        channel, data = self._chunks.popleft()
        self._consumed += len(data)
        return channel, data

    def grant_due(self) -> bool:
        """Whether a CREDIT frame was queued for what has been read."""
        if self._consumed < GRANT_AT_BYTES or self.finished or not self._link.has_stream(self._stream):
            return False
        self._link.grant(self._stream, self._consumed)
        self._consumed = 0
        return True

    def _wake(self) -> None:
        if self._waiting is not None:
            self._waiting.set()
            self._waiting = None
