"""Received DATA of one stream, waiting to be read; reading it is what grants the sender more credit."""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING

import trio

from agent.wire.limits import INITIAL_CREDIT

if TYPE_CHECKING:
    from agent.wire.link import Link

MAX_WINDOW_BYTES = 1024 * 1024
"""What a sender may have under way to a reader that keeps up. With the initial credit alone a fast sender spends half
its time waiting for CREDIT; a stream that nobody reads never gets more than that."""


GROWN_BYTES = 64 * 1024 * 1024
"""By which all windows of one connection together may be larger than the initial credit. A reader that was fast and
then stalls keeps its window full: without this, a thousand of them would hold a gigabyte."""


_SMALL_BYTES = 512
"""Chunks below this are packed behind each other: as objects of their own they cost a hundred bytes each, and a
hostile peer may spend its whole credit on chunks of one byte."""

_PACK_BYTES = 64 * 1024
_RECORD = struct.Struct(">BH")


class Growth:
    """What the windows of one connection have grown by. `alone`: only that of a stream beside which there is no other
    grows, and it shrinks again when another comes. What a flood has under way is what a terminal's echo waits behind,
    and a near peer gains little by it: a distant one would lose its speed."""

    __slots__ = ("_alone", "_left", "_windows")

    def __init__(self, limit: int = GROWN_BYTES, *, alone: bool = False) -> None:
        self._left = limit
        self._alone = alone
        self._windows = 0

    def enter(self) -> None:
        """A window more."""
        self._windows += 1

    def leave(self, grown: int) -> None:
        """A window is gone that had grown by so much."""
        self._windows -= 1
        self._left += grown

    @property
    def crowded(self) -> bool:
        """Whether no window may be larger than the initial credit."""
        return self._alone and self._windows > 1

    def take(self, amount: int) -> bool:
        """Whether there were `amount` bytes left."""
        if amount > self._left:
            return False
        self._left -= amount
        return True

    def give_back(self, amount: int) -> None:
        """A window has shrunk."""
        self._left += amount


class Inbox:
    """Chunks of one stream. Bounded by the credit that the link enforces: at most four bytes held for each of it.

    The window, what the sender may have sent beyond what was read, starts as the initial credit and is granted anew
    each time half of it was read. It doubles when the reader had by then read everything, as far as `growth` goes, and
    shrinks, when `growth` says so, by what is read.
    """

    __slots__ = ("_chunks", "_consumed", "_growth", "_link", "_offset", "_stream", "_waiting", "_window", "finished")

    def __init__(self, link: Link, stream: int, growth: Growth) -> None:
        self.finished = False
        self._growth = growth
        self._growth.enter()
        self._link = link
        self._stream = stream
        self._chunks: deque[tuple[int, bytes] | bytearray] = deque()
        self._offset = 0
        self._consumed = 0
        self._window = INITIAL_CREDIT
        self._waiting: trio.Event | None = None

    def put(self, channel: int, data: bytes) -> None:
        """A chunk arrived."""
        if len(data) >= _SMALL_BYTES:
            self._chunks.append((channel, data))
        else:
            pack = self._chunks[-1] if self._chunks else None
            if not isinstance(pack, bytearray) or len(pack) >= _PACK_BYTES:
                pack = bytearray()
                self._chunks.append(pack)
            pack += _RECORD.pack(channel, len(data)) + data
        self._wake()

    def finish(self) -> None:
        """Nothing more will arrive."""
        self.finished = True
        self._wake()

    def discard(self) -> None:
        """Nobody reads any more. The owner's last word, always: what the window has grown by is others' then."""
        self._chunks.clear()
        self._growth.leave(self._window - INITIAL_CREDIT)
        self._window = INITIAL_CREDIT

    async def get(self) -> tuple[int, bytes] | None:
        """The next chunk as (channel, bytes), None after the last. One reader at a time."""
        if self._chunks or self.finished:
            await trio.lowlevel.checkpoint()
        while not self._chunks:
            if self.finished:
                return None
            self._waiting = trio.Event()
            await self._waiting.wait()
        chunk = self._take()
        self._consumed += len(chunk[1])
        return chunk

    def more(self, channel: int, most: int) -> list[bytes]:
        """What has come on `channel` behind the chunk that was read last, at most `most` bytes of it; no waiting."""
        found = []
        while self._chunks and self._next_is(channel, most):
            data = self._take()[1]
            found.append(data)
            most -= len(data)
            self._consumed += len(data)
        return found

    def _next_is(self, channel: int, most: int) -> bool:
        head = self._chunks[0]
        if isinstance(head, bytearray):
            first, length = _RECORD.unpack_from(head, self._offset)
            return bool(first == channel and length <= most)
        return head[0] == channel and len(head[1]) <= most

    def _take(self) -> tuple[int, bytes]:
        head = self._chunks[0]
        if not isinstance(head, bytearray):
            self._chunks.popleft()
            return head
        channel, length = _RECORD.unpack_from(head, self._offset)
        begin = self._offset + _RECORD.size
        self._offset = begin + length
        data = bytes(head[begin : self._offset])
        if self._offset == len(head):
            self._chunks.popleft()
            self._offset = 0
        return channel, data

    def grant_due(self) -> bool:
        """Whether a CREDIT frame was queued for what has been read."""
        if self._consumed < self._window // 2 or self.finished or not self._link.has_stream(self._stream):
            return False
        amount = self._consumed + self._resize()
        self._consumed = 0
        if amount > 0:
            self._link.grant(self._stream, amount)
        return amount > 0

    def _resize(self) -> int:
        """What to grant beyond what was read; negative: of that, what is not granted again."""
        if self._growth.crowded:
            change = -min(self._window - INITIAL_CREDIT, self._consumed)
            self._growth.give_back(-change)
        elif not self._chunks and self._window < MAX_WINDOW_BYTES:
            change = min(self._window, MAX_WINDOW_BYTES - self._window)
            change = change if self._growth.take(change) else 0
        else:
            change = 0
        self._window += change
        return change

    def _wake(self) -> None:
        if self._waiting is not None:
            self._waiting.set()
            self._waiting = None
