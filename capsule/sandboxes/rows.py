"""Rows of sandboxes as the use-cases need them: looked up for a team, moved by compare-and-set, shown as views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, TypeVarTuple, cast
from uuid import UUID

import structlog
import trio

from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import FINAL, Status
from capsule import errors
from capsule.db.queries import audit, sandboxes
from capsule.db.translated import TranslatedDatabase
from capsule.hosts.answers import storable_text
from capsule.model import SandboxStatus, SandboxView

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from capsule.db.connection import Connection
    from capsule.db.queries.audit import Outcome
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.principals import Principal

log = structlog.get_logger()

SETTLE_TIMEOUT = 30.0
"""How long a result waits for a database that is away before it is left to the monitor."""
SETTLE_PAUSE = 0.5

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A running sandbox: what a call into it needs."""

    id: UUID
    host: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """What the audit trail says of a change: who did it, and what it was."""

    who: Principal
    action: str
    metadata: Mapping[str, str]


class SandboxRows(TranslatedDatabase):
    """The database as seen from the use-cases."""

    async def get(self, principal: Principal, sandbox: UUID) -> SandboxRow:
        """The team's row. NotFound for another team's, as for none."""
        return found(await self.run(sandboxes.get, principal.team_id, sandbox))

    async def running(self, principal: Principal, sandbox: UUID) -> Placed:
        """The team's sandbox, which must run; resets its idle clock. NotFound, InvalidState."""
        row = found(await self.run(_get_and_touch, principal.team_id, sandbox))
        if row.status != Status.RUNNING or row.host_id is None:
            raise wrong_status(row)
        return Placed(id=row.id, host=row.host_id)

    async def settle(
        self,
        row: SandboxRow,
        to_status: Status,
        *,
        host_ip: str | None = None,
        reason: str | None = None,
        trail: Trail | None = None,
    ) -> SandboxRow:
        """Write an outcome: compare-and-set from `row`, with patience for a database that is away.

        Returns the row as it is now, whoever changed it. `trail` is written if it was us.
        """
        return await self.patiently(_change_or_read, row, to_status, host_ip, reason, trail)

    async def patiently(self, fn: Callable[[Connection, *Ts], Awaitable[T]], *args: *Ts) -> T:
        """A transaction that must not be lost because the database is away for a moment; may be run twice."""
        deadline = trio.current_time() + SETTLE_TIMEOUT
        while True:
            try:
                return await self.transaction(fn, *args)
            except errors.DatabaseUnavailable:
                if trio.current_time() >= deadline:
                    raise
                log.warning("outcome_waits_for_database")
            await trio.sleep(SETTLE_PAUSE)

    async def check_unchanged(self, row: SandboxRow) -> None:
        """Fault `invalid_state` when somebody has changed the row's status, so that its host is not asked for nothing.

        Whether a database that is away would say so does not matter: the outcome is a compare-and-set.
        """
        try:
            now = await self.run(sandboxes.get_any, row.id)
        except errors.DatabaseUnavailable:
            return
        if now is not None and now.generation != row.generation:
            status = {"status": now.status}
            raise Fault(FaultCode.INVALID_STATE, f"the sandbox became {now.status} meanwhile", details=status)

    async def hand_over(self, row: SandboxRow) -> None:
        """Leave the row to the monitor, which asks its host what became of it. If the database is away, it does so at
        the row's deadline."""
        try:
            await self.run(sandboxes.hand_over, row.id, row.generation)
        except errors.DatabaseUnavailable:
            log.warning("row_not_handed_over", sandbox_id=str(row.id))


async def _get_and_touch(connection: Connection, team: UUID, sandbox: UUID) -> SandboxRow | None:
    row = await sandboxes.get(connection, team, sandbox)
    if row is not None and row.status == Status.RUNNING:
        await sandboxes.touch(connection, sandbox)
    return row


async def _change_or_read(
    tx: Connection, row: SandboxRow, to_status: Status, host_ip: str | None, reason: str | None, trail: Trail | None
) -> SandboxRow:
    changed = await sandboxes.change_status(
        tx,
        row.id,
        from_status=row.status,
        generation=row.generation,
        to_status=to_status,
        host_ip=host_ip,
        reason=None if reason is None else storable_text(reason),
    )
    if changed is None:
        return found(await sandboxes.get_any(tx, row.id))
    if trail is not None:
        outcome: Outcome = "info" if trail.who.actor_type == "system" else "success"
        await record(tx, trail.who, row.id, trail.action, outcome, trail.metadata)
    log.info("sandbox_status", sandbox_id=str(row.id), from_status=row.status, to_status=to_status)
    return changed


def found(row: SandboxRow | None) -> SandboxRow:
    """The row, or NotFound."""
    if row is None:
        raise errors.NotFound("there is no such sandbox in this team")
    return row


async def record(
    tx: Connection,
    who: Principal,
    resource: UUID,
    action: str,
    status: Outcome,
    metadata: Mapping[str, str],
    *,
    kind: Literal["sandbox", "snapshot"] = "sandbox",
) -> None:
    """The audit row of what `who` did to a sandbox or snapshot, in the action's own transaction."""
    await audit.append(
        tx,
        team_id=who.team_id,
        actor_type=who.actor_type,
        actor_id=None if who.actor_type == "system" else who.actor_id,
        actor_name=who.actor_name,
        resource_type=kind,
        resource_id=f"{'sb' if kind == 'sandbox' else 'tpl'}-{resource}",
        action=action,
        status=status,
        metadata=metadata,
    )


def wrong_status(row: SandboxRow, needed: str = "a running one") -> errors.InvalidState:
    """For a sandbox whose status does not allow what was asked for."""
    if row.status in FINAL:
        why = f": {row.reason}" if row.reason else ""
        return errors.InvalidState(f"the sandbox is {row.status}{why}; create a new one", status=row.status)
    return errors.InvalidState(f"the sandbox is {row.status}; this needs {needed}", status=row.status)


def view(row: SandboxRow) -> SandboxView:
    """A row as its team sees it."""
    return SandboxView(
        id=row.id,
        status=cast("SandboxStatus", row.status),
        template=row.template,
        vcpus=row.vcpus,
        memory_mb=row.memory_mb,
        disk_mb=row.disk_mb,
        timeout_sec=row.timeout_sec,
        created_at=row.created_at,
        last_updated=row.last_updated,
        host_id=row.host_id,
        host_ip=str(row.host_ip) if row.host_ip is not None else None,
        metadata=row.metadata or None,
        started_at=row.started_at,
        last_active_at=row.last_active_at,
        reason=row.reason,
    )
