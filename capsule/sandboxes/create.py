"""POST /v1/sandboxes: reserve a host, one transaction, tell the host, one compare-and-set.

Every step may be the last: the row is there before the host hears of it, the host makes the same sandbox for the same
id however often it is asked, and a row that nobody finishes is finished by the monitor from the host's listing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import msgspec
import structlog
import trio

from agent.wire import calls
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule import errors
from capsule.db.errors import ConstraintViolated
from capsule.db.queries import idempotency, sandboxes, teams, templates
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.rows import found, record, view
from capsule.scheduler.placement import Size

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.connection import Connection
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
RETRIED = frozenset({FaultCode.UNAVAILABLE, FaultCode.BUSY})


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
                return view(await self._await_outcome(earlier))
        return view(await self.operations.finish(partial(self._create, principal, request, idempotency_key)))

    async def _create(self, principal: Principal, request: CreateSandbox, key: str | None) -> SandboxRow:
        want = Size(vcpus=request.vcpus, memory_mb=request.memory_mb, disk_mb=self.settings.disk_mb)
        async with self.scheduler.reserve(want) as host:
            row, mine = await self._begin(principal, request, key, host)
        if not mine:
            return await self._await_outcome(row.id)
        with structlog.contextvars.bound_contextvars(sandbox_id=str(row.id), host_id=str(row.host_id)):
            return await self._start(row, request)

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
        except Fault as fault:
            error = as_error(fault)
            log.warning("sandbox_not_started", code=fault.code, message=fault.message)
            now = await self.rows.settle(row, Status.ERROR, reason=error.message)
            if now.status != Status.RUNNING:
                raise error from fault
            return now
        now = await self.rows.settle(row, Status.RUNNING, host_ip=state.host_ip)
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
                return calls.parse(calls.SandboxState, answer)
            except Fault as fault:
                if fault.code not in RETRIED or not fault.retryable or left < RETRY_PAUSE * 2:
                    raise
                log.info("create_retried", code=fault.code, message=fault.message)
            await trio.sleep(RETRY_PAUSE)

    async def _earlier(self, principal: Principal, request: CreateSandbox, key: str) -> UUID | None:
        """The sandbox an earlier request with this key made."""
        claim = await self.rows.run(idempotency.get, principal.team_id, key)
        if claim is None:
            return None
        if claim.request_sha256 != fingerprint(request):
            raise errors.IdempotencyKeyReused("this Idempotency-Key was used for a different request; use a new one")
        return claim.resource_id

    async def _await_outcome(self, sandbox: UUID) -> SandboxRow:
        """Wait for whoever makes it (another request, another control plane, or the monitor after a crash)."""
        deadline = trio.current_time() + self.settings.create_timeout
        while True:
            row = found(await self.rows.run(sandboxes.get_any, sandbox))
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


@dataclass(frozen=True)
class NewSandbox:
    """What the transaction writes down."""

    principal: Principal
    request: CreateSandbox
    idempotency_key: str | None
    host: UUID
    settings: Settings


async def insert(tx: Connection, new: NewSandbox) -> tuple[SandboxRow, bool]:
    """The one transaction: quota, idempotency, row, audit. The row, and whether it is this request's."""
    sandbox, principal, request = uuid4(), new.principal, new.request
    if new.idempotency_key is not None:
        taken = await idempotency.claim(tx, principal.team_id, new.idempotency_key, fingerprint(request), sandbox)
        if taken is not None:
            if taken.request_sha256 != fingerprint(request):
                raise errors.IdempotencyKeyReused("this Idempotency-Key was used for a different request")
            return found(await sandboxes.get_any(tx, taken.resource_id)), False
    await check_quota(tx, principal, request)
    if await templates.get_by_name(tx, principal.team_id, request.template) is None:
        raise errors.NotFound(f"there is no template {request.template!r}; GET /v1/snapshots lists them")
    deadline = datetime.now(UTC) + timedelta(seconds=new.settings.create_timeout)
    row = await sandboxes.insert(
        tx,
        id=sandbox,
        team_id=principal.team_id,
        template=request.template,
        vcpus=request.vcpus,
        memory_mb=request.memory_mb,
        disk_mb=new.settings.disk_mb,
        timeout_sec=request.timeout_sec,
        metadata=dict(request.metadata),
        transition_deadline=deadline,
    )
    await record(tx, principal, sandbox, "create", "success", {"template": request.template})
    placed = await sandboxes.change_status(
        tx,
        sandbox,
        from_status=row.status,
        generation=row.generation,
        to_status=Status.STARTING,
        host_id=new.host,
        transition_deadline=deadline,
    )
    return found(placed), True


async def check_quota(tx: Connection, principal: Principal, request: CreateSandbox) -> None:
    """The team's limits. QuotaExceeded names the one that was hit."""
    limits = await teams.limits(tx, principal.team_id)
    if limits is None:
        raise errors.NoTeam("your team was deleted")
    live = await sandboxes.count_live(tx, principal.team_id)
    for name, wanted, limit in (
        ("max_vcpus", request.vcpus, limits.max_vcpus),
        ("max_memory_mb", request.memory_mb, limits.max_memory_mb),
        ("max_sandboxes", live + 1, limits.max_sandboxes),
    ):
        if wanted > limit:
            raise errors.QuotaExceeded(f"{name} of your team is {limit}, this needs {wanted}", limit=name)


def fingerprint(request: CreateSandbox) -> bytes:
    """SHA-256 of what was asked for, the same for the same request."""
    return hashlib.sha256(msgspec.json.encode(request, order="sorted")).digest()
