"""How many calls into one guest run at once, and how many may wait: the rest is told so at once."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RUNNING = 32
"""Calls in a guest at a time: under its daemon's 64 foreground processes, and each holds at most one
window of either connection in the agent (2 MiB, and 512 KiB until it has proved fast)."""
WAITING = 64
"""Calls that wait their turn: about what a small guest works off in a default exec time-out."""


class Gate:
    """One per sandbox."""

    def __init__(self, running: int = RUNNING, waiting: int = WAITING) -> None:
        self._limiter = trio.CapacityLimiter(running)
        self._waiting = waiting

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Hold a place. Fault `too_many_processes` when too many wait already."""
        if self._limiter.statistics().tasks_waiting >= self._waiting:
            raise Fault(
                FaultCode.TOO_MANY_PROCESSES,
                f"{RUNNING} calls run and {WAITING} wait in this sandbox; try again when some have ended",
                retryable=True,
            )
        async with self._limiter:
            yield

    def busy(self) -> bool:
        """Whether a call runs or waits."""
        figures = self._limiter.statistics()
        return bool(figures.borrowed_tokens or figures.tasks_waiting)

    def statistics(self) -> trio.CapacityLimiterStatistics:
        """Calls running and waiting."""
        return self._limiter.statistics()
