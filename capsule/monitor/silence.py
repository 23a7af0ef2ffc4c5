"""For how long each host has been silent, as far as we listened: by our own clock, from when we first saw its last
heartbeat. That heartbeat's time is only compared with itself: it is of the database's clock, which need not be ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from uuid import UUID

    from capsule.db.queries.hosts import HostRow

LONGEST_GAP = 10.0
"""Seconds that count at most between two looks. Whoever was stopped, or without a database, heard nobody meanwhile."""


@dataclass(slots=True)
class _Heard:
    beat: datetime | None
    silence: float = 0.0
    again: bool = False
    """Whether it beat since we first looked."""


class Silence:
    """The memory of one process; it stays when the lead is lost and taken again. `timeout`: seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._heard: dict[UUID, _Heard] = {}
        self._looked_at = trio.current_time()

    def look(self, hosts: Iterable[HostRow]) -> None:
        """Take in the rows of all hosts, just read. Others are forgotten."""
        now = trio.current_time()
        gap = min(now - self._looked_at, LONGEST_GAP)
        self._looked_at = now
        before, self._heard = self._heard, {}
        for host in hosts:
            heard = before.get(host.id)
            if heard is None:
                heard = _Heard(host.last_heartbeat)
            elif heard.beat != host.last_heartbeat:
                heard = _Heard(host.last_heartbeat, again=True)
            else:
                heard.silence += gap
            self._heard[host.id] = heard

    def is_lost(self, host: UUID) -> bool:
        """Whether it was silent for the time-out while we listened."""
        return self._heard[host].silence >= self._timeout

    def is_heard(self, host: UUID) -> bool:
        """Whether it beat under our eyes, and goes on."""
        return self._heard[host].again and not self.is_lost(host)
