"""Input on its way to a process, held for one that does not read - so that signals and sizes behind it can be acted on.

Owns: the bytes that a client sent and the process has not taken. Owned by: `following.follow`. Takes: `put`, `end`.
Dies when: cancelled, or the input has ended and all of it is delivered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from capsule.errors import InvalidRequest

if TYPE_CHECKING:
    from capsule.http.stream_ports import ProcessStream

QUEUE_BYTES = 256 * 1024
"""Of input that waits. A single message may have more."""

CHUNK_BYTES = 64 * 1024
"""Handed to the process at a time."""


class InputQueue:
    """One process's. One task puts, one feeds."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._ended = False
        self._filled = trio.Event()
        self._drained = trio.Event()

    async def put(self, data: bytes) -> None:
        """Waits while the queue is full. InvalidRequest after `end`."""
        if self._ended:
            raise InvalidRequest("The input was closed before; nothing can follow.")
        while self._waiting and len(self._waiting) + len(data) > QUEUE_BYTES:
            self._drained = trio.Event()
            await self._drained.wait()
        self._waiting += data
        self._filled.set()

    def end(self) -> None:
        """Nothing follows what is waiting."""
        self._ended = True
        self._filled.set()

    async def feed(self, process: ProcessStream) -> None:
        """Deliver it, as fast as the process reads."""
        while True:
            while not self._waiting and not self._ended:
                self._filled = trio.Event()
                await self._filled.wait()
            if not self._waiting:
                await process.end()
                return
            chunk = bytes(self._waiting[:CHUNK_BYTES])
            await process.send(chunk)
            del self._waiting[: len(chunk)]
            self._drained.set()
