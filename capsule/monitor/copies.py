"""Snapshots on one host: copies of deleted templates are removed, lost ones are marked, unknown ones are collected.

Like sandboxes they are compared with a listing that was asked for after the rows were read, and nothing that a host
says makes a row: a copy is a host's because a control plane had it made there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import structlog
import trio

from agent.wire import calls
from agent.wire.faults import Fault
from capsule.db.errors import DatabaseUnavailable
from capsule.db.queries import templates
from capsule.monitor.contained import contained

if TYPE_CHECKING:
    from agent.wire.calls import HostListing
    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.db.queries.templates import Copy
    from capsule.hosts.links import HostLinks

log = structlog.get_logger()

SNAPSHOT_GRACE = 900.0
"""Seconds that a snapshot without a row may stay: whoever made it may still be at work (a fork, a slow database)."""
CALL_TIMEOUT = 30.0
MAX_AT_ONCE = 200
"""Unknown snapshots watched, and removals under way: a host that invents some costs no more than that."""


class CopyKeeper:
    """Knows since when snapshots that nobody speaks of have been on the host, and what is being removed."""

    def __init__(self, host: UUID, db: Database, links: HostLinks) -> None:
        self._host = host
        self._db = db
        self._links = links
        self._unknown: dict[UUID, float] = {}
        self._removing: set[UUID] = set()

    async def read(self) -> list[Copy]:
        """The rows; before the listing is asked for."""
        return await self._db.run(templates.copies_on, self._host)

    async def compare(self, copies: list[Copy], listing: HostListing, nursery: trio.Nursery) -> None:
        """One round. Removals run in `nursery`: one that hangs holds up nothing."""
        there = {UUID(one) for one in listing.snapshots}
        for copy in copies:
            if not copy.wanted:
                self._remove(copy.template_id, nursery, there=copy.template_id in there)
            elif copy.lost == (copy.template_id in there):
                await self._mark(copy)
        await self._collect(there - {copy.template_id for copy in copies}, nursery)

    async def _mark(self, copy: Copy) -> None:
        lost = not copy.lost
        log.warning("snapshot_lost" if lost else "snapshot_found", snapshot_id=str(copy.template_id))
        await self._db.run(_mark, copy.template_id, self._host, lost)

    async def _collect(self, unknown: set[UUID], nursery: trio.Nursery) -> None:
        """Remove what was there without a row for the whole grace."""
        now = trio.current_time()
        known = {one: since for one, since in self._unknown.items() if one in unknown}
        self._unknown = known | dict.fromkeys(sorted(unknown - known.keys())[: MAX_AT_ONCE - len(known)], now)
        due = [one for one, since in self._unknown.items() if now - since >= SNAPSHOT_GRACE]
        if not due:
            return
        written_down = await self._db.run(templates.known_copies, self._host, due)
        for one in due:
            if one not in written_down:
                self._remove(one, nursery, there=True)

    def _remove(self, snapshot: UUID, nursery: trio.Nursery, *, there: bool) -> None:
        if snapshot not in self._removing and len(self._removing) < MAX_AT_ONCE:
            self._removing.add(snapshot)
            nursery.start_soon(self._take_back, snapshot, there)

    @contained
    async def _take_back(self, snapshot: UUID, there: bool) -> None:
        try:
            if there:
                log.warning("snapshot_removed", snapshot_id=str(snapshot))
                body = calls.body_of(calls.SnapshotRef(snapshot_id=str(snapshot)))
                await self._links.call(self._host, "snapshot.remove", body, timeout=CALL_TIMEOUT)
            await self._db.run(templates.forget_copy, snapshot, self._host)
        except Fault as fault:
            log.warning("snapshot_stays", snapshot_id=str(snapshot), code=fault.code, message=fault.message)
        except DatabaseUnavailable as err:
            log.info("copy_not_forgotten", snapshot_id=str(snapshot), reason=str(err))
        finally:
            self._removing.discard(snapshot)


async def _mark(connection: Connection, template: UUID, host: UUID, lost: bool) -> None:
    await templates.mark_copy(connection, template, host, lost=lost)
