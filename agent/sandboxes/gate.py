"""How many calls into one guest run at once, and how many may wait: the rest is told so at once.

Three lanes that cannot fill each other: short calls take turns; live ones (consoles, terminals, downloads), of which
nobody knows how long they last, get a place or none; those that steer and end processes always get through.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from enum import Enum, auto
from typing import TYPE_CHECKING

import trio

from agent.wire import limits
from agent.wire.calls import CONTROL_METHODS, LIVE_METHODS
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RUNNING = 32
"""Short calls in a guest at a time: under its daemon's 256 foreground processes, and each holds at most one
window of either connection in the agent (2 MiB, and 512 KiB until it has proved fast)."""
WAITING = 64
"""Short calls that wait their turn: about what a small guest works off in a default exec time-out."""
LIVE = 256
"""Live calls of a guest: as many as its daemon has room for foreground processes. Nobody waits for one of these."""
STEERING = 8
STEERING_WAITING = 64
"""A guest answers these at once, or not at all."""

ROOM = limits.MAX_STREAMS * 15 // 16
"""Calls into guests at once, of all sandboxes together; the rest of a connection's streams is for creates, destroys
and the monitor."""
LIVE_ROOM = ROOM // 2
STEERING_ROOM = ROOM // 16


class Lane(Enum):
    """Which places a call takes."""

    SHORT = auto()
    LIVE = auto()
    STEERING = auto()


def lane_of(method: str, *, live: bool) -> Lane:
    """Where a call belongs. `live`: its caller says so."""
    if method in CONTROL_METHODS:
        return Lane.STEERING
    return Lane.LIVE if live or method in LIVE_METHODS else Lane.SHORT


class Gate:
    """One per sandbox."""

    def __init__(self, running: int = RUNNING, waiting: int = WAITING, live: int = LIVE) -> None:
        self._turns = {
            Lane.SHORT: _Turns(running, waiting),
            Lane.LIVE: _Turns(live, 0),
            Lane.STEERING: _Turns(STEERING, STEERING_WAITING),
        }

    @asynccontextmanager
    async def enter(self, lane: Lane = Lane.SHORT) -> AsyncIterator[None]:
        """Hold a place. Fault `too_many_processes` when too many wait already."""
        turns = self._turns[lane]
        if turns.full():
            raise Fault(FaultCode.TOO_MANY_PROCESSES, turns.refusal(lane), retryable=True)
        async with turns.limiter:
            yield

    def busy(self) -> bool:
        """Whether a call of any kind runs or waits."""
        return any(turns.busy() for turns in self._turns.values())

    def held(self, lane: Lane) -> int:
        """Calls that run or wait in a lane."""
        figures = self._turns[lane].limiter.statistics()
        return figures.borrowed_tokens + figures.tasks_waiting

    def statistics(self, lane: Lane = Lane.SHORT) -> trio.CapacityLimiterStatistics:
        """Calls running and waiting."""
        return self._turns[lane].limiter.statistics()


class _Turns:
    """The places of one lane."""

    def __init__(self, places: int, waiting: int) -> None:
        self.limiter = trio.CapacityLimiter(places)
        self._waiting = waiting

    def full(self) -> bool:
        figures = self.limiter.statistics()
        return figures.borrowed_tokens >= figures.total_tokens and figures.tasks_waiting >= self._waiting

    def busy(self) -> bool:
        figures = self.limiter.statistics()
        return bool(figures.borrowed_tokens or figures.tasks_waiting)

    def refusal(self, lane: Lane) -> str:
        places = round(self.limiter.total_tokens)
        if lane is Lane.LIVE:
            return f"{places} streams are open in this sandbox; close one of them and try again"
        return f"{places} calls run and {self._waiting} wait in this sandbox; try again when some have ended"


class Room:
    """One per host: how many calls into all of its guests run and wait. No lane takes another's places, and in a lane
    nobody takes the last ones: a sandbox gets one more while it holds fewer than are left (Choudhury and Hahne 1998,
    "dynamic queue length thresholds"). Four that take all they can hold a fifth each and leave one to who comes."""

    def __init__(self) -> None:
        places = {Lane.LIVE: LIVE_ROOM, Lane.STEERING: STEERING_ROOM}
        self._left = {Lane.SHORT: ROOM - sum(places.values()), **places}

    @asynccontextmanager
    async def enter(self, lane: Lane, held: int) -> AsyncIterator[None]:
        """Hold a place, for a sandbox that holds so many. Fault `busy`."""
        if self._left[lane] <= held:
            raise Fault(FaultCode.BUSY, "this host has too many calls under way; try again in a moment", retryable=True)
        self._left[lane] -= 1
        try:
            yield
        finally:
            self._left[lane] += 1
