"""DELETE /v1/sandboxes/{id}: the row says `stopping` first, the host does it, the row says `stopped`.

From `stopping` on there is no way back, and the monitor finishes what nobody else does.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from agent.wire import calls
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import FINAL, Status
from capsule import errors
from capsule.db.queries import sandboxes
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.rows import found, record

if TYPE_CHECKING:
    from uuid import UUID

    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks
    from capsule.principals import Principal
    from capsule.sandboxes.operations import Operations
    from capsule.sandboxes.rows import SandboxRows

log = structlog.get_logger()

RETRY_PAUSE = 0.5
RETRIED = frozenset({FaultCode.UNAVAILABLE, FaultCode.BUSY, FaultCode.DRAINING})
"""An agent that restarts, or has too much to do, is asked again while there is time."""
MAX_RACES = 5
"""Times the row may change between being read and being written before we ask the client to try again."""


@dataclass(frozen=True, kw_only=True)
class Destroyer:
    """Ends sandboxes."""

    rows: SandboxRows
    links: HostLinks
    operations: Operations
    settings: Settings

    async def destroy(self, principal: Principal, sandbox: UUID) -> None:
        """End it and wait until nothing of it is left; nothing to do for one that has ended."""
        await self.operations.finish(partial(self._destroy, principal, sandbox))

    async def _destroy(self, principal: Principal, sandbox: UUID) -> None:
        row = await self.rows.transaction(begin, principal, sandbox, self.settings.call_timeout)
        if row.status not in FINAL:
            with structlog.contextvars.bound_contextvars(sandbox_id=str(row.id)):
                await self.finish(row)

    async def finish(self, row: SandboxRow) -> None:
        """Take a row that is `stopping` to its end. HostUnavailable when the host cannot be reached in time."""
        if row.host_id is not None:
            await self._tell_host(row.host_id, row.id)
        await self.rows.settle(row, Status.STOPPED)

    async def _tell_host(self, host: UUID, sandbox: UUID) -> None:
        body = calls.body_of(calls.SandboxRef(sandbox_id=str(sandbox)))
        deadline = trio.current_time() + self.settings.call_timeout
        while True:
            left = deadline - trio.current_time()
            try:
                await self.links.call(host, "sandbox.destroy", body, timeout=left)
            except Fault as fault:
                if fault.code not in RETRIED or left < RETRY_PAUSE * 2:
                    log.warning("sandbox_not_destroyed", code=fault.code, message=fault.message)
                    raise _unfinished(fault) from fault
            else:
                return
            await trio.sleep(RETRY_PAUSE)


def _unfinished(fault: Fault) -> errors.CapsuleError:
    if fault.code in {FaultCode.UNAVAILABLE, FaultCode.DRAINING, FaultCode.DEADLINE_EXCEEDED}:
        return errors.HostUnavailable(
            "the sandbox is stopping; its host does not answer, it will be destroyed when the host is back",
            retry_after=5,
        )
    return as_error(fault)


async def begin(tx: Connection, principal: Principal, sandbox: UUID, seconds: float) -> SandboxRow:
    """Make the row `stopping` and audit it, unless it has ended; the monitor takes over after `seconds`."""
    for _ in range(MAX_RACES):
        row = found(await sandboxes.get(tx, principal.team_id, sandbox))
        if row.status in FINAL or row.status == Status.STOPPING:
            return row
        stopping = await sandboxes.change_status(
            tx,
            sandbox,
            from_status=row.status,
            generation=row.generation,
            to_status=Status.STOPPING,
            transition_deadline=datetime.now(UTC) + timedelta(seconds=seconds),
        )
        if stopping is not None:
            await record(tx, principal, sandbox, "destroy", "warning", {})
            return stopping
    raise errors.Busy("the sandbox's status keeps changing; try again", retry_after=1)
