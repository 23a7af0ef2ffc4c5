"""Whether this host is part of its fleet right now: a latest-value cell that the heartbeat writes and anyone reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import trio

State = Literal["starting", "online", "lost", "refused"]

GONE: tuple[State, ...] = ("lost", "refused")
"""The states of a host without a control plane."""


@dataclass(frozen=True, slots=True)
class Presence:
    """`state` since `since` (Trio time). lost: no answer for too long; refused: the control plane does not know us any
    more. `reason` is for people."""

    state: State
    since: float
    reason: str = ""


class PresenceCell:
    """Holds the latest value only: a slow reader misses steps in between, never the last one."""

    def __init__(self, value: Presence) -> None:
        self._value = value
        self._changed = trio.Event()

    @property
    def value(self) -> Presence:
        """The latest."""
        return self._value

    def publish(self, value: Presence) -> None:
        """Replace it and wake everybody who waits."""
        self._value = value
        self._changed.set()
        self._changed = trio.Event()

    async def wait_for(self, *states: State) -> Presence:
        """The value as soon as its state is one of `states`; at once when it is already."""
        await trio.lowlevel.checkpoint()
        while self._value.state not in states:
            await self._changed.wait()
        return self._value
