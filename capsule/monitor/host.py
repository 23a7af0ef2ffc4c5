"""Follows one host: a listing at once, at every change the agent tells of, and every few seconds anyway.

Owns: the watch stream to its agent, the memory of strangers it saw. Owned by: the monitor's nursery.
Takes: nothing; the agent's notices and the clock are its input. Emits: changed rows, acknowledgements, destroys.
Dies when: the monitor ends it (the host is gone, or another control plane leads). It writes nothing it could lose.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

import structlog
import trio

from agent.wire import calls
from agent.wire.faults import Fault
from agent.wire.lifecycle import FINAL
from capsule.db.errors import DatabaseUnavailable
from capsule.db.queries import sandboxes, templates
from capsule.monitor.reconcile import Change, DestroyAgain, plan, strangers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.actor.peer import OpenedStream
    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks

log = structlog.get_logger()

INTERVAL = 5.0
"""Seconds between listings that nothing asked for."""
RETRY_PAUSE = 1.0
CALL_TIMEOUT = 10.0
STRANGER_GRACE = 30.0
"""How long a VM without a row may stay: a row may be committed after the host was told, never long after."""


class HostFollower:
    """See the module's docstring."""

    def __init__(self, host: UUID, db: Database, links: HostLinks) -> None:
        self._host = host
        self._db = db
        self._links = links
        self._strangers: dict[UUID, float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        with structlog.contextvars.bound_contextvars(host_id=str(self._host)):
            while True:
                try:
                    await self._follow()
                except Fault as fault:
                    log.info("host_not_followed", code=fault.code, message=fault.message)
                except DatabaseUnavailable as err:
                    log.info("host_not_followed", reason=str(err))
                await trio.sleep(RETRY_PAUSE)

    async def _follow(self) -> None:
        """Hold the watch stream; reconcile on every notice and every interval. Ends with a Fault, or quietly."""
        await self._learn_templates()
        async with self._links.open_stream(self._host, "host.watch", {}) as stream:
            while await self._changed(stream):
                await self._reconcile()

    async def _changed(self, stream: OpenedStream) -> bool:
        """Wait for a notice, an interval at most; False when the agent ended the stream."""
        with trio.move_on_after(INTERVAL):
            return await anext(stream, None) is not None
        return True

    async def _learn_templates(self) -> None:
        """The base images that this host has are everyone's."""
        answer = await self._links.call(self._host, "host.describe", {}, timeout=CALL_TIMEOUT)
        for image in calls.parse(calls.HostDescription, answer).templates:
            await self._db.transaction(_upsert_base, image)

    async def _reconcile(self) -> None:
        rows = await self._db.run(sandboxes.on_host, self._host)
        answer = await self._links.call(self._host, "host.list", {}, timeout=CALL_TIMEOUT)
        listing = calls.parse(calls.HostListing, answer)
        for step in plan(rows, listing, datetime.now(UTC)):
            match step:
                case Change():
                    await self._db.transaction(_apply, step)
                case DestroyAgain(row=row):
                    await self._destroy(row.id, "its row is stopping")
        await self._end_strangers(strangers(rows, listing))
        if listing.outbox:
            last = max(entry.sequence for entry in listing.outbox)
            await self._links.call(
                self._host, "host.acknowledge", calls.body_of(calls.Acknowledge(sequence=last)), timeout=CALL_TIMEOUT
            )

    async def _end_strangers(self, found: Iterable[UUID]) -> None:
        """End VMs that no row needs: at once when the row has ended, after a grace when there is none."""
        found = set(found)
        self._strangers = {one: since for one, since in self._strangers.items() if one in found}
        for sandbox in found:
            row = await self._db.run(sandboxes.get_any, sandbox)
            if row is not None and row.status not in FINAL and row.host_id == self._host:
                continue  # committed after the rows were read
            since = self._strangers.setdefault(sandbox, trio.current_time())
            if row is not None or trio.current_time() - since >= STRANGER_GRACE:
                await self._destroy(sandbox, "its row has ended" if row else "it has no row")

    async def _destroy(self, sandbox: UUID, why: str) -> None:
        log.warning("stray_vm_destroyed", sandbox_id=str(sandbox), why=why)
        body = calls.body_of(calls.SandboxRef(sandbox_id=str(sandbox)))
        await self._links.call(self._host, "sandbox.destroy", body, timeout=CALL_TIMEOUT)


async def _upsert_base(tx: Connection, image: calls.TemplateDescription) -> None:
    await templates.upsert_base(tx, name=image.name, size_bytes=image.size_bytes)


async def _apply(tx: Connection, step: Change) -> SandboxRow | None:
    changed = await sandboxes.change_status(
        tx,
        step.row.id,
        from_status=step.row.status,
        generation=step.row.generation,
        to_status=step.to_status,
        host_ip=step.host_ip,
        reason=step.reason,
    )
    if changed is not None:
        log.warning(
            "row_reconciled",
            sandbox_id=str(step.row.id),
            from_status=step.row.status,
            to_status=step.to_status,
            reason=step.reason,
        )
    return changed
