"""Since when a sandbox is idle, and when it may be paused for that."""

from __future__ import annotations

import math

import trio

from agent.actor.supervise import RestartPolicy

RETRY = RestartPolicy(first_delay=5, max_delay=300)
"""Seconds from one automatic pause that failed to the next try."""


class IdleClock:
    """One per sandbox, in Trio time: steps of the host's clock are no idleness."""

    def __init__(self) -> None:
        self._since = trio.current_time()
        self._failures = 0
        self._not_before = -math.inf

    def touch(self) -> None:
        """Something was asked of the sandbox, or was answered just now."""
        self._since = trio.current_time()

    def expired(self, timeout: float) -> bool:
        """Whether it has been idle for `timeout` seconds (0: there is no such time)."""
        now = trio.current_time()
        return 0 < timeout <= now - self._since and now >= self._not_before

    def failed(self) -> bool:
        """An automatic pause has failed: try later. True for the first of a streak."""
        self._failures += 1
        self._not_before = trio.current_time() + RETRY.delay(self._failures)
        return self._failures == 1

    def succeeded(self) -> None:
        """A pause has succeeded, whoever asked for it."""
        self._failures = 0
        self._not_before = -math.inf
