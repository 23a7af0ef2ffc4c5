"""Deleting a host. One transaction when nothing lives or rests there; else, if forced, two.

The first makes its sandboxes `stopping` and due, closes the host, and writes down when it is to be gone. Until then its
agent, as far as it can be reached, is told to end them: by us, and by whoever follows the host. The second lets what
is left end in `error`, and the host is gone. If we die, the monitor makes the second one; who asks again, does too.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

import structlog
import trio

from agent.wire.faults import Fault
from capsule import errors
from capsule.db.queries import fleet, sandboxes
from capsule.fleet.acting import act_on

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from capsule.db.connection import Connection
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks
    from capsule.principals import User
    from capsule.sandboxes.operations import Operations
    from capsule.sandboxes.rows import SandboxRows

log = structlog.get_logger()

PATIENCE = 30.0
"""Seconds that the agent gets to end what is there."""
MARGIN = 15.0
"""More, before somebody else finishes the removal: the one who began it is at it, if it lives."""
REACH_TIMEOUT = 5.0
AT_ONCE = 8
"""Sandboxes that are being ended at the same time."""
ANSWERING = frozenset({"online", "draining"})
"""Statuses of hosts whose agents are worth asking."""


@dataclass(frozen=True, kw_only=True)
class Remover:
    """Deletes hosts."""

    rows: SandboxRows
    links: HostLinks
    operations: Operations
    end: Callable[[SandboxRow], Awaitable[None]]
    """Tells a host to end a sandbox, and settles its `stopping` row. Raises CapsuleError."""

    async def delete(self, user: User, host: UUID, *, force: bool) -> None:
        """See `capsule.http.fleet_port.FleetService`."""
        begun = await self.rows.transaction(_begin, user, host, force)
        if begun is not None:
            await self.operations.finish(partial(self._finish, host, begun), key=("host.remove", host))
        self.links.forget(host)
        log.info("host_deleted", host_id=str(host), forced=force)

    async def _finish(self, host: UUID, rows: list[SandboxRow]) -> None:
        with trio.move_on_after(PATIENCE):
            if rows and await self._answers(host):
                await self._end_all(rows)
        await self.rows.patiently(fleet.finish_removal, host)

    async def _answers(self, host: UUID) -> bool:
        try:
            await self.links.reach(host, timeout=REACH_TIMEOUT)
        except Fault as fault:
            log.info("host_not_asked", host_id=str(host), code=fault.code, message=fault.message)
            return False
        return True

    async def _end_all(self, rows: list[SandboxRow]) -> None:
        limit = trio.Semaphore(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for row in rows:
                await limit.acquire()
                nursery.start_soon(self._end, row, limit)

    async def _end(self, row: SandboxRow, limit: trio.Semaphore) -> None:
        try:
            await self.end(row)
        except errors.CapsuleError as err:
            log.warning("sandbox_not_ended", sandbox_id=str(row.id), code=err.code, message=err.message)
        finally:
            limit.release()


async def _begin(tx: Connection, user: User, host_id: UUID, force: bool) -> list[SandboxRow] | None:
    """None: the host is gone already. Else what its agent is to end, all `stopping`."""
    acting = await act_on(tx, "deleteHost", user, host_id)
    there = await sandboxes.on_host(tx, host_id)
    if there and not force:
        raise errors.HostHasSandboxes(
            f"{len(there)} sandboxes live or rest on this host; delete them first, or send force=true: they end then",
            sandbox_ids=[f"sb-{row.id}" for row in there],
        )
    if not there:
        if not await fleet.being_removed(tx, host_id):  # else whoever began it has said so
            await acting.record("delete", status="warning")
        await fleet.mark_deleted(tx, host_id)
        return None
    if await fleet.begin_removal(tx, host_id, datetime.now(UTC) + timedelta(seconds=PATIENCE + MARGIN)):
        forced = {"forced": "true", "sandboxes": str(len(there))}
        await acting.record("delete", status="warning", metadata=forced)
    # A team's own host: its people are told who. Of the platform's people they are not told.
    actor = (user.id, user.email) if acting.host.of_team else (None, "platform")
    await fleet.stop_sandboxes(tx, host_id, actor_id=actor[0], actor_name=actor[1])
    return await sandboxes.on_host(tx, host_id) if acting.host.status in ANSWERING else []
