"""POST …/resume: room on its host, the row says `resuming`, the host does it, the row says `running`.

If it fails, the snapshot is still there, and the row says `paused` again. A row that says `running` may be behind: its
host pauses idle sandboxes by itself, so it is asked all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import structlog

from agent.wire import calls
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import TRANSITIONAL, Status
from capsule import errors
from capsule.db.errors import DatabaseUnavailable
from capsule.db.queries import audit, hosts, sandboxes
from capsule.db.translated import NO_ANSWER
from capsule.hosts.answers import parse_answer, storable_address
from capsule.sandboxes.asking import UNCERTAIN, look, persist
from capsule.sandboxes.destroy import MAX_RACES
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.rows import Trail, found, record, view, wrong_status
from capsule.scheduler.placement import Size, WishThere

if TYPE_CHECKING:
    from uuid import UUID

    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks
    from capsule.model import SandboxView
    from capsule.principals import Principal
    from capsule.sandboxes.operations import Operations
    from capsule.sandboxes.rows import SandboxRows
    from capsule.scheduler.scheduler import Scheduler

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Resumer:
    """Wakes sandboxes."""

    rows: SandboxRows
    links: HostLinks
    scheduler: Scheduler
    operations: Operations
    settings: Settings

    async def resume(self, principal: Principal, sandbox: UUID) -> SandboxView:
        """Resume it and wait until it runs; nothing to do for one that does. Goes on when the caller goes away."""
        await self.rows.get(principal, sandbox)  # another team's joins nothing
        work = partial(self._resume, principal, sandbox)
        return view(await self.operations.finish(work, key=("resume", sandbox)))

    async def _resume(self, principal: Principal, sandbox: UUID) -> SandboxRow:
        for _ in range(MAX_RACES):
            row = await self.rows.get(principal, sandbox)
            with structlog.contextvars.bound_contextvars(sandbox_id=str(row.id), host_id=str(row.host_id)):
                now = await self._attempt(principal, row)
            if now is None or now.status == Status.PAUSED:
                continue  # changed under our hands; what another's try left behind
            if now.status not in {Status.RUNNING, Status.PAUSING}:
                raise wrong_status(now)
            return now
        raise errors.Busy("the sandbox's status keeps changing; try again", retry_after=1)

    async def _attempt(self, principal: Principal, row: SandboxRow) -> SandboxRow | None:
        """The row as it is after one try; None when it changed before we could begin."""
        trail = _trail(principal, row)
        match row.status:
            case Status.RUNNING:
                return await self._confirm(row, trail)
            case Status.PAUSED:
                resuming = await self._begin(row)
                return None if resuming is None else await self._finish(resuming, trail)
            case Status.RESUMING:
                return await self._finish(row, trail)
            case _:
                raise wrong_status(row, "a paused one")

    async def _confirm(self, row: SandboxRow, trail: Trail) -> SandboxRow | None:
        """Have the host see to it that it runs; the row says so already, unless it changes (None)."""
        try:
            state = await self._ask_host(row)
        except Fault as err:
            fault = err
        else:
            return await self.rows.patiently(_make_true, row, storable_address(state.host_ip), trail)
        now = await self.rows.run(sandboxes.get_any, row.id)
        if now is not None and now.generation != row.generation:
            return None
        raise as_error(fault) from fault

    async def _begin(self, row: SandboxRow) -> SandboxRow | None:
        """Make the row `resuming`, with room for it; NoHostsAvailable names what its host is short of."""
        try:
            async with self.scheduler.reserve_there(_other_half(row)):
                return await self.rows.transaction(begin, row, self.settings.resume_timeout)
        except errors.NoHostsAvailable as err:
            if err.extra.get("limits") != ["hosts"]:
                raise
            raise errors.HostUnavailable("the sandbox's host is not online; try again later", retry_after=10) from err
        except DatabaseUnavailable as err:
            raise errors.DatabaseUnavailable(NO_ANSWER, retry_after=1) from err
        except Fault as fault:
            raise as_error(fault) from fault

    async def _finish(self, row: SandboxRow, trail: Trail) -> SandboxRow:
        """Take a row that is `resuming` on; the row as it is afterwards. Raises when it still rests."""
        try:
            state = await self._ask_host(row)
        except Fault as err:
            fault = err
        else:
            return await self._running(row, state, trail)
        log.warning("sandbox_not_resumed", code=fault.code, message=fault.message)
        assert row.host_id is not None  # noqa: S101 - it rested there
        seen = await look(self.links, row.host_id, row.id) if fault.code in UNCERTAIN else Status.PAUSED
        if isinstance(seen, calls.SandboxState):
            return await self._running(row, seen, trail)
        if seen == Status.PAUSED:
            return await self._undone(row, as_error(fault))
        await self.rows.hand_over(row)
        raise _unknown(as_error(fault)) from fault

    async def _running(self, row: SandboxRow, state: calls.SandboxState, trail: Trail) -> SandboxRow:
        return await self.rows.settle(row, Status.RUNNING, host_ip=storable_address(state.host_ip), trail=trail)

    async def _undone(self, row: SandboxRow, error: errors.CapsuleError) -> SandboxRow:
        """Back to `paused`; raises `error`, unless somebody else has brought the row further."""
        now = await self.rows.settle(row, Status.PAUSED, reason=f"it could not be resumed: {error.message}")
        if now.status in {Status.PAUSED, Status.RESUMING}:
            raise error
        return now

    async def _ask_host(self, row: SandboxRow) -> calls.SandboxState:
        assert row.host_id is not None  # noqa: S101 - it is not pending
        answer = await persist(
            self.links,
            row.host_id,
            "sandbox.resume",
            calls.body_of(calls.SandboxRef(sandbox_id=str(row.id))),
            timeout=self.settings.resume_timeout,
            patience=self.settings.call_timeout,
            check=partial(self.rows.check_unchanged, row),
        )
        state = parse_answer(calls.SandboxState, answer)
        if state.status != Status.RUNNING:
            raise Fault(FaultCode.INTERNAL, "the sandbox's host did not resume it; try again")
        return state


def _trail(principal: Principal, row: SandboxRow) -> Trail:
    return Trail(who=principal, action="resume", metadata={"template": row.template})


def _other_half(row: SandboxRow) -> WishThere:
    """What it holds running and not at rest; a VMM is counted either way."""
    assert row.host_id is not None  # noqa: S101 - it rests there
    half = Size(vcpus=-(-row.vcpus // 2), memory_mb=-(-row.memory_mb // 2))
    return WishThere(size=half, host=row.host_id, resident=True)


def _unknown(error: errors.CapsuleError) -> errors.HostUnavailable:
    return errors.HostUnavailable(
        f"{error.message}; whether the sandbox runs, its status will say in a moment", retry_after=5
    )


async def begin(tx: Connection, row: SandboxRow, seconds: float) -> SandboxRow | None:
    """Make a paused row `resuming`; None when it was changed. NoHostsAvailable when its host is not online any more."""
    if row.host_id is None or not await hosts.hold_open(tx, row.host_id, resident=True):
        raise errors.NoHostsAvailable("the sandbox's host is not online", limits=["hosts"])
    return await sandboxes.change_status(
        tx,
        row.id,
        from_status=row.status,
        generation=row.generation,
        to_status=Status.RESUMING,
        transition_deadline=datetime.now(UTC) + timedelta(seconds=seconds),
    )


async def _make_true(tx: Connection, row: SandboxRow, host_ip: str | None, trail: Trail) -> SandboxRow | None:
    """The host says that it runs, as the row did: None when that one changed meanwhile, and what was seen is old. A row
    that will be told of an auto-pause is brought through it: its address is an old one, and its new generation makes
    nothing of what was seen of it before."""
    now = found(await sandboxes.get_any(tx, row.id))
    if now.generation != row.generation:
        return None
    if host_ip is None or row.host_ip is None or host_ip == str(row.host_ip):
        return now
    for status in (Status.PAUSING, Status.PAUSED, Status.RESUMING, Status.RUNNING):
        changed = await sandboxes.change_status(
            tx,
            now.id,
            from_status=now.status,
            generation=now.generation,
            to_status=status,
            transition_deadline=datetime.now(UTC) if status in TRANSITIONAL else None,
            host_ip=host_ip if status == Status.RUNNING else None,
        )
        if changed is None:  # the first step: somebody was quicker
            return None
        now = changed
    reason = {"reason": "its host paused it"}
    await audit.append_system(tx, now.team_id, now.id, action="pause", status="info", metadata=reason)
    await record(tx, trail.who, now.id, trail.action, "success", trail.metadata)
    return now
