"""Bounded mailbox of an actor, with a stop lane that is read first, and the reply slot of a question.

Senders never wait: a full mailbox is `Busy` at once (503 + Retry-After at the edge), so one stuck actor cannot hold up
a dispatcher. The stop lane has room for one request and is always free for it. (After omicron's instance runner.)
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from agent.wire.faults import Fault, FaultCode

M = TypeVar("M")
T = TypeVar("T")


class Busy(Fault):
    """The actor has as much to do as it may hold."""

    def __init__(self, name: str) -> None:
        super().__init__(FaultCode.BUSY, f"{name} is busy; try again in a moment", retryable=True)


class ReplySlot(Generic[T]):
    """Where the one answer to a question goes. An asker that went away is tolerated; a second answer is ignored."""

    __slots__ = ("_answered", "_error", "_value")

    _value: T

    def __init__(self) -> None:
        self._answered = trio.Event()
        self._error: Exception | None = None

    def answer(self, value: T) -> None:
        """Success."""
        if not self._answered.is_set():
            self._value = value
            self._answered.set()

    def fail(self, error: Exception) -> None:
        """Failure: raised where the asker waits."""
        if not self._answered.is_set():
            self._error = error
            self._answered.set()

    def answered(self) -> bool:
        """Whether the answer is there."""
        return self._answered.is_set()

    async def wait(self, *, deadline: float = math.inf) -> T:
        """The answer. Fault `deadline_exceeded` at `deadline` (Trio time); whoever answers is not disturbed."""
        with trio.move_on_at(deadline):
            await self._answered.wait()
        if not self._answered.is_set():
            raise Fault(FaultCode.DEADLINE_EXCEEDED, "no answer in time", retryable=True)
        if self._error is not None:
            raise self._error
        return self._value


@dataclass(frozen=True, slots=True)
class MailboxStatistics:
    """Figures of one mailbox since it was made."""

    capacity: int
    waiting: int
    received: int
    refused: int
    stopping: bool


class Mailbox(Generic[M]):
    """Messages for one actor, in order, at most `capacity`; plus the stop lane."""

    def __init__(self, name: str, capacity: int) -> None:
        self._name = name
        self._capacity = capacity
        self._messages: deque[M] = deque()
        self._stop: M | None = None
        self._stop_seen = False
        self._closed = False
        self._wanted = trio.Event()
        self._received = 0
        self._refused = 0
        self.stop_requested = trio.Event()

    def send_nowait(self, message: M) -> None:
        """Put a message at the end. Raises Busy when full or when the actor is ending."""
        if self._closed or len(self._messages) >= self._capacity:
            self._refused += 1
            raise Busy(self._name)
        self._messages.append(message)
        self._wanted.set()

    def stop_nowait(self, message: M) -> bool:
        """Ask the actor to stop, ahead of everything.

        False when it was asked before (that request stands) or has closed its mailbox: `message` is then not read.
        """
        if self._closed or self._stop is not None:
            return False
        self._stop = message
        self.stop_requested.set()
        self._wanted.set()
        return True

    async def receive(self) -> M:
        """The stop request if there is one, else the oldest message, else wait. Only the actor calls this."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._stop is not None:
                self._stop_seen = True
                return self._stop
            if self._messages:
                self._received += 1
                return self._messages.popleft()
            self._wanted = trio.Event()
            await self._wanted.wait()

    def close(self) -> list[M]:
        """Refuse everything from now on; returns what nobody will read, a stop request not yet received first."""
        left = list(self._messages)
        if self._stop is not None and not self._stop_seen and not self._closed:
            left.insert(0, self._stop)
        self._closed = True
        self._messages.clear()
        return left

    def statistics(self) -> MailboxStatistics:
        """Figures for /metrics and debugging."""
        return MailboxStatistics(
            capacity=self._capacity,
            waiting=len(self._messages),
            received=self._received,
            refused=self._refused,
            stopping=self._stop is not None,
        )
