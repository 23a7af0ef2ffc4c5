"""Whether something changed since one last looked: a level, so that a burst of notices costs one look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from agent.actor.peer import OpenedStream


class News:
    """Told by one task, waited for by another."""

    def __init__(self) -> None:
        self._told = trio.Event()
        self._over = False

    def tell(self) -> None:
        """There is something to look at."""
        self._told.set()

    async def wait(self, seconds: float) -> bool:
        """Return when there is, or after `seconds`; False when the stream has ended."""
        with trio.move_on_after(seconds):
            await self._told.wait()
        self._told = trio.Event()
        return not self._over

    async def listen(self, stream: OpenedStream) -> None:
        """Read notices as they come, so that the sender never waits for a slow look; until the stream ends."""
        async for _ in stream:
            self.tell()
        self._over = True
        self.tell()
