"""POST /v1/sandboxes: reserve a host, one transaction, tell the host, one compare-and-set.

Every step may be the last: the row is there before the host hears of it, the host makes the same sandbox for the same
id however often it is asked, and a row that nobody finishes is finished by the monitor from the host's listing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from agent.wire import calls
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule import errors
from capsule.db.errors import ConstraintViolated, DatabaseUnavailable
from capsule.db.queries import idempotency, sandboxes
from capsule.hosts.answers import parse_answer, storable_address
from capsule.sandboxes.admission import NewSandbox, examine, insert, same_request
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.rows import NO_ANSWER, found, view
from capsule.scheduler.placement import Size

if TYPE_CHECKING:
    from uuid import UUID

    from capsule.config import Settings
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks
    from capsule.model import CreateSandbox, Principal, SandboxView
    from capsule.sandboxes.operations import Operations
    from capsule.sandboxes.rows import SandboxRows
    from capsule.scheduler.scheduler import Scheduler

log = structlog.get_logger()

RETRY_PAUSE = 0.5
"""Between tries to reach a host whose agent is away; agents restart in a second or two."""
REPLAY_PAUSE = 0.25
RETRIED = frozenset({FaultCode.UNAVAILABLE, FaultCode.BUSY, FaultCode.DRAINING})


@dataclass(frozen=True, kw_only=True)
class Creator:
    """Makes sandboxes."""

    rows: SandboxRows
    links: HostLinks
    scheduler: Scheduler
    operations: Operations
    settings: Settings

    async def create(self, principal: Principal, request: CreateSandbox, idempotency_key: str | None) -> SandboxView:
        """Make a sandbox and wait until it runs; goes on when the caller goes away."""
        if idempotency_key is not None:
            earlier = await self._earlier(principal, request, idempotency_key)
            if earlier is not None:
                return view(await self.operations.finish(partial(self._resume, earlier, request)))
        return view(await self.operations.finish(partial(self._create, principal, request, idempotency_key)))

    async def _create(self, principal: Principal, request: CreateSandbox, key: str | None) -> SandboxRow:
        row, mine = await self._place(principal, request, key)
        if not mine:
            return await self._resume(row.id, request)
        with structlog.contextvars.bound_contextvars(sandbox_id=str(row.id), host_id=str(row.host_id)):
            return await self._start(row, request)

    async def _resume(self, sandbox: UUID, request: CreateSandbox) -> SandboxRow:
        """Finish what an earlier request with this key began: whoever works on it may have died with its process. The
        host makes the same sandbox for the same id, and the outcome is written once."""
        row = found(await self.rows.run(sandboxes.get_any, sandbox))
        if row.status != Status.STARTING:
            return await self._await_outcome(sandbox)
        with structlog.contextvars.bound_contextvars(sandbox_id=str(row.id), host_id=str(row.host_id)):
            return await self._start(row, request)

    async def _place(self, principal: Principal, request: CreateSandbox, key: str | None) -> tuple[SandboxRow, bool]:
        """The row, on a host with room for it, and whether it is this request's to start."""
        want = Size(
            vcpus=request.vcpus, memory_mb=request.memory_mb + calls.VMM_MEMORY_MB, disk_mb=self.settings.disk_mb
        )
        try:
            async with self.scheduler.reserve(want) as host:
                return await self._begin(principal, request, key, host)
        except errors.NoHostsAvailable as err:
            full = err
        except DatabaseUnavailable as err:
            raise errors.DatabaseUnavailable(NO_ANSWER, retry_after=1) from err
        except Fault as fault:
            raise as_error(fault) from fault
        # That the fleet is full is of no interest to a repeated request, nor to one that would be refused anyway.
        row = await self.rows.transaction(examine, principal, request, key)
        if row is None:
            raise full
        return row, False

    async def _begin(
        self, principal: Principal, request: CreateSandbox, key: str | None, host: UUID
    ) -> tuple[SandboxRow, bool]:
        try:
            return await self.rows.transaction(insert, NewSandbox(principal, request, key, host, self.settings))
        except ConstraintViolated as err:
            if err.name == "sandboxes_team_alive":
                raise errors.NoTeam("your team was deleted") from err
            if err.name == "sandboxes_live_host":
                raise errors.NoHostsAvailable("the host was removed; try again", retry_after=1) from err
            raise

    async def _start(self, row: SandboxRow, request: CreateSandbox) -> SandboxRow:
        """Have the host make it; settle the row either way."""
        try:
            state = await self._ask_host(row, request)
        except Fault as err:
            fault = err
        else:
            return self._outcome(await self.rows.settle(row, Status.RUNNING, host_ip=storable_address(state.host_ip)))
        error = as_error(fault)
        log.warning("sandbox_not_started", code=fault.code, message=fault.message)
        now = await self.rows.settle(row, Status.ERROR, reason=error.message)
        if now.status == Status.ERROR:
            raise error from fault
        return self._outcome(now)

    async def _ask_host(self, row: SandboxRow, request: CreateSandbox) -> calls.SandboxState:
        """Ask until it answers or the time is up: an agent that restarts in between makes it anew."""
        assert row.host_id is not None  # noqa: S101 - it was placed
        body = calls.body_of(
            calls.CreateSandbox(
                sandbox_id=str(row.id),
                template=row.template,
                vcpus=row.vcpus,
                memory_mb=row.memory_mb,
                hostname=f"sb-{row.id.hex[:12]}",
                envs=dict(request.envs),
            )
        )
        deadline = trio.current_time() + self.settings.create_timeout
        while True:
            left = deadline - trio.current_time()
            try:
                answer = await self.links.call(row.host_id, "sandbox.create", body, timeout=left)
                return parse_answer(calls.SandboxState, answer)
            except Fault as fault:
                if fault.code not in RETRIED or not fault.retryable or left < RETRY_PAUSE * 2:
                    raise
                log.info("create_retried", code=fault.code, message=fault.message)
            await trio.sleep(RETRY_PAUSE)
            await self._check_wanted(row)

    async def _check_wanted(self, row: SandboxRow) -> None:
        """Fault `invalid_state` when the row has moved on, so that a host that comes back is not asked for nothing."""
        try:
            now = await self.rows.run(sandboxes.get_any, row.id)
        except errors.DatabaseUnavailable:
            return
        if now is not None and (now.status, now.generation) != (row.status, row.generation):
            raise Fault(FaultCode.INVALID_STATE, "the sandbox was destroyed while it was being made")

    async def _earlier(self, principal: Principal, request: CreateSandbox, key: str) -> UUID | None:
        """The sandbox an earlier request with this key made."""
        claim = await self.rows.run(idempotency.get, principal.team_id, key)
        return None if claim is None else same_request(claim, request)

    async def _await_outcome(self, sandbox: UUID) -> SandboxRow:
        """Wait for whoever makes it (another request, another control plane, or the monitor after a crash)."""
        deadline = trio.current_time() + self.settings.create_timeout
        while True:
            row = found(await self.rows.run(sandboxes.get_any, sandbox))
            if row.status == Status.ERROR and row.started_at is None:
                raise errors.HostUnavailable(f"{row.reason}; to try again, use a new Idempotency-Key")
            if row.status not in {Status.PENDING, Status.STARTING}:
                return self._outcome(row)
            if trio.current_time() >= deadline:
                raise errors.Busy("the sandbox is still being made; ask again", retry_after=5)
            await trio.sleep(REPLAY_PAUSE)

    @staticmethod
    def _outcome(row: SandboxRow) -> SandboxRow:
        """The row of a sandbox that was made, whatever became of it since; raises when it was not."""
        if row.status == Status.ERROR and row.started_at is None:
            raise errors.HostUnavailable(row.reason or "the sandbox could not be started", retry_after=2)
        if row.status in {Status.STOPPING, Status.STOPPED} and row.started_at is None:
            raise errors.InvalidState("the sandbox was destroyed while it was being made", status=row.status)
        return row
