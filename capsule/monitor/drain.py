"""Puts what runs on a draining host to rest, a few at a time, for as long as it drains.

Owns: the pauses it asked for. Owned by: the host's follower. Takes: `look`, with the host's rows of each round.
Emits: pauses, through the ordinary use-case: compare-and-set on the row, the host asked, one outcome whoever asks.
Dies when: the follower does; whoever follows the host then goes on, since what is left to do stands in the rows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING
from uuid import UUID

import structlog
import trio

from agent.wire.lifecycle import Status
from capsule.db.errors import DatabaseUnavailable
from capsule.db.queries import hosts
from capsule.errors import CapsuleError
from capsule.monitor.contained import contained

if TYPE_CHECKING:
    from capsule.db.pool import Database
    from capsule.db.queries.sandboxes import SandboxRow

log = structlog.get_logger()

Pause = Callable[[UUID, UUID, str], Awaitable[None]]
"""Pauses a sandbox of that team, for that reason, and waits until it rests. Raises CapsuleError."""

AT_ONCE = 4
"""A pause writes a guest's memory to the host's disk: more of them at once are not done sooner."""
AGAIN_AFTER = 30.0
"""Seconds after which one that could not be paused is tried again."""
REASON = "its host is being drained"


class Drainer:
    """See the module's docstring."""

    def __init__(self, host: UUID, db: Database, pause: Pause) -> None:
        self._host = host
        self._db = db
        self._pause = pause
        self._waiting: list[SandboxRow] = []
        self._busy: set[UUID] = set()
        self._again_at: dict[UUID, float] = {}

    async def look(self, rows: Iterable[SandboxRow], nursery: trio.Nursery) -> None:
        """Begin with those that run, if the host drains; forget the rest of them if it does so no more."""
        if not await self._draining():
            self._waiting.clear()
            self._again_at.clear()
            return
        now = trio.current_time()
        self._again_at = {one: when for one, when in self._again_at.items() if when > now}
        running = (row for row in rows if row.status == Status.RUNNING)
        self._waiting = [row for row in running if row.id not in self._busy and row.id not in self._again_at]
        for _ in range(min(AT_ONCE - len(self._busy), len(self._waiting))):
            nursery.start_soon(self._work, self._take())

    @contained
    async def _work(self, row: SandboxRow | None) -> None:
        while row is not None:
            try:
                await self._put_to_rest(row)
            finally:
                self._busy.discard(row.id)
            row = self._take()

    def _take(self) -> SandboxRow | None:
        """The next one; it is busy from now on, so that no second one is begun in its place."""
        if not self._waiting:
            return None
        row = self._waiting.pop(0)
        self._busy.add(row.id)
        return row

    async def _put_to_rest(self, row: SandboxRow) -> None:
        try:
            if await self._draining():
                await self._pause(row.team_id, row.id, REASON)
        except (CapsuleError, DatabaseUnavailable) as err:
            self._again_at[row.id] = trio.current_time() + AGAIN_AFTER
            log.warning("sandbox_not_drained", sandbox_id=str(row.id), reason=str(err))

    async def _draining(self) -> bool:
        host = await self._db.run(hosts.get, self._host)
        return host is not None and host.status == "draining"
