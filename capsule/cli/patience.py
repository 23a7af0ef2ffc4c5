"""How long a lost connection is tried again, and after which pauses."""

from __future__ import annotations

import random

import trio

from capsule.client import ApiError, CapsuleError, ConnectionLost, StreamClosed

GIVE_UP_AFTER = 600.0
"""Seconds. As long as a process that has ended is remembered in its sandbox."""
FIRST_PAUSE = 0.25
LONGEST_PAUSE = 5.0
PASSING = frozenset({1001, 1012, 1013})
"""Close codes of a server that goes away for now."""
TRANSIENT = frozenset({429, 500, 502, 503, 504})
"""HTTP statuses that another moment may change."""


def is_loss(error: CapsuleError) -> bool:
    """Whether it is the connection that failed (or a server that restarts), and not what was asked."""
    if isinstance(error, StreamClosed):
        return error.code in PASSING or error.code - 4000 in TRANSIENT
    return isinstance(error, ConnectionLost) or (isinstance(error, ApiError) and error.status in TRANSIENT)


class Patience:
    """One series of attempts."""

    def __init__(self, seconds: float = GIVE_UP_AFTER) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._pause = FIRST_PAUSE

    def restored(self) -> None:
        """It works again: the next loss has all the time again."""
        self._since = None
        self._pause = FIRST_PAUSE

    async def wait(self) -> bool:
        """Until the next attempt; False when it is time to give up. The pauses double, with jitter."""
        now = trio.current_time()
        if self._since is None:
            self._since = now
        elif now - self._since > self._seconds:
            return False
        await trio.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
        return True
