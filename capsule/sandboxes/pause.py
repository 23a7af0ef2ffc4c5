"""POST …/pause: the row says `pausing`, the host does it, the row says `paused`.

The VM is its host's: if the pause fails there it runs on, and so says the row. Whoever asks while it is under way gets
the same outcome: in this process the same work, in another one the same question to the host, which is idempotent.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from agent.wire import calls
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule import errors
from capsule.db.queries import sandboxes
from capsule.hosts.answers import parse_answer
from capsule.principals import Principal
from capsule.sandboxes.asking import UNCERTAIN, look, persist
from capsule.sandboxes.destroy import MAX_RACES
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.rows import Trail, found, view, wrong_status

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks
    from capsule.model import SandboxView
    from capsule.sandboxes.operations import Operations
    from capsule.sandboxes.rows import SandboxRows

log = structlog.get_logger()

NOBODY = UUID(int=0)
"""In place of who asked, when that is the system itself."""


@dataclass(frozen=True, kw_only=True)
class Pauser:
    """Puts sandboxes to rest."""

    rows: SandboxRows
    links: HostLinks
    operations: Operations
    settings: Settings

    async def pause(self, principal: Principal, sandbox: UUID) -> SandboxView:
        """Pause it and wait until it rests; nothing to do for one that does. Goes on when the caller goes away."""
        await self.rows.get(principal, sandbox)  # another team's joins nothing
        work = partial(self._pause, principal, sandbox, "requested")
        return view(await self.operations.finish(work, key=("pause", sandbox)))

    async def pause_by_system(self, team: UUID, sandbox: UUID, reason: str) -> None:
        """The same without anybody who asked."""
        system = Principal(team_id=team, actor_type="system", actor_id=NOBODY, actor_name="monitor")
        await self.operations.finish(partial(self._pause, system, sandbox, reason), key=("pause", sandbox))

    async def _pause(self, principal: Principal, sandbox: UUID, reason: str) -> SandboxRow:
        for _ in range(MAX_RACES):
            row = await self.rows.transaction(begin, principal, sandbox, self.settings.pause_timeout)
            if row.status == Status.PAUSED:
                return row
            with structlog.contextvars.bound_contextvars(sandbox_id=str(row.id), host_id=str(row.host_id)):
                now = await self._finish(row, Trail(who=principal, action="pause", metadata={"reason": reason}))
            if now.status in {Status.PAUSED, Status.RESUMING}:
                return now
            if now.status != Status.RUNNING:
                raise wrong_status(now)
            # somebody else's try had failed, or the sandbox was resumed already
        raise errors.Busy("the sandbox's status keeps changing; try again", retry_after=1)

    async def _finish(self, row: SandboxRow, trail: Trail) -> SandboxRow:
        """Take a row that is `pausing` on; the row as it is afterwards. Raises when it runs on."""
        assert row.host_id is not None  # noqa: S101 - it ran
        try:
            await self._ask_host(row.host_id, row)
        except Fault as err:
            fault = err
        else:
            return await self.rows.settle(row, Status.PAUSED, trail=trail)
        log.warning("sandbox_not_paused", code=fault.code, message=fault.message)
        seen = await look(self.links, row.host_id, row.id) if fault.code in UNCERTAIN else Status.RUNNING
        if seen == Status.PAUSED:
            return await self.rows.settle(row, Status.PAUSED, trail=trail)
        if seen is not None:
            return await self._undone(row, as_error(fault))
        await self.rows.hand_over(row)
        raise _unknown(as_error(fault)) from fault

    async def _undone(self, row: SandboxRow, error: errors.CapsuleError) -> SandboxRow:
        """Back to `running`; raises `error`, unless somebody else has brought the row further."""
        now = await self.rows.settle(row, Status.RUNNING, reason=f"it could not be paused: {error.message}")
        if now.status in {Status.RUNNING, Status.PAUSING}:
            raise error
        return now

    async def _ask_host(self, host: UUID, row: SandboxRow) -> None:
        body = calls.body_of(calls.SandboxRef(sandbox_id=str(row.id)))
        answer = await persist(
            self.links,
            host,
            "sandbox.pause",
            body,
            timeout=self.settings.pause_timeout,
            patience=self.settings.call_timeout,
            check=partial(self.rows.check_unchanged, row),
        )
        if parse_answer(calls.SandboxState, answer).status != Status.PAUSED:
            raise Fault(FaultCode.INTERNAL, "the sandbox's host did not pause it; try again")


def _unknown(error: errors.CapsuleError) -> errors.HostUnavailable:
    return errors.HostUnavailable(
        f"{error.message}; whether the sandbox is paused, its status will say in a moment", retry_after=5
    )


async def begin(tx: Connection, principal: Principal, sandbox: UUID, seconds: float) -> SandboxRow:
    """Make a running row `pausing`; a row that is on its way there, or has arrived, is left as it is."""
    for _ in range(MAX_RACES):
        row = found(await sandboxes.get(tx, principal.team_id, sandbox))
        if row.status in {Status.PAUSED, Status.PAUSING}:
            return row
        if row.status != Status.RUNNING:
            raise wrong_status(row)
        pausing = await sandboxes.change_status(
            tx,
            sandbox,
            from_status=row.status,
            generation=row.generation,
            to_status=Status.PAUSING,
            transition_deadline=datetime.now(UTC) + timedelta(seconds=seconds),
        )
        if pausing is not None:
            return pausing
    raise errors.Busy("the sandbox's status keeps changing; try again", retry_after=1)
