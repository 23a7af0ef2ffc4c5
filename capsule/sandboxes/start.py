"""From a row that is `starting` to one that runs: the host makes it, the row says how it went.

The host makes the same sandbox for the same id however often it is asked: whoever finds such a row may go on with it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias
from uuid import UUID

import structlog
import trio

from agent.wire import calls
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule import errors
from capsule.hosts.answers import parse_answer, storable_address
from capsule.sandboxes.asking import persist
from capsule.sandboxes.failures import as_error

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks
    from capsule.sandboxes.rows import SandboxRows

log = structlog.get_logger()

Move: TypeAlias = "Callable[[SandboxRow], Awaitable[SandboxRow | None]]"
"""Gives a row another host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a sandbox starts with. `snapshot` None: its template's base image. `fork`: `envs` are those of the source,
    which its host knows."""

    snapshot: UUID | None = None
    envs: Mapping[str, str] = field(default_factory=dict)
    fork: bool = False


@dataclass(frozen=True, kw_only=True)
class Starter:
    """Takes rows from `starting` to `running`, or to `error`."""

    rows: SandboxRows
    links: HostLinks
    settings: Settings

    async def start(
        self, row: SandboxRow, origin: Origin, *, seconds: float, elsewhere: Move | None = None
    ) -> SandboxRow:
        """Have the host make it, or, when that has no room, the one that `elsewhere` finds; settle the row either way.
        Raises why it does not run. The row may still be starting: somebody else has moved it, and works on it."""
        deadline = trio.current_time() + seconds
        while True:
            with structlog.contextvars.bound_contextvars(sandbox_id=str(row.id), host_id=str(row.host_id)):
                result = await self._start(row, origin, deadline - trio.current_time())
                if not isinstance(result, Fault):
                    return result
                full = result.code == FaultCode.NO_CAPACITY and trio.current_time() < deadline
                moved = await elsewhere(row) if full and elsewhere is not None else None
                if moved is None:
                    return await self._failed(row, result)
            row = moved

    async def _start(self, row: SandboxRow, origin: Origin, seconds: float) -> SandboxRow | Fault:
        try:
            state = await self._ask_host(row, origin, seconds)
        except Fault as fault:
            return fault
        return outcome(await self.rows.settle(row, Status.RUNNING, host_ip=storable_address(state.host_ip)))

    async def _failed(self, row: SandboxRow, fault: Fault) -> SandboxRow:
        error = as_error(fault)
        log.warning("sandbox_not_started", code=fault.code, message=fault.message)
        now = await self.rows.settle(row, Status.ERROR, reason=error.message)
        if now.status == Status.ERROR:
            raise error from fault
        return outcome(now)

    async def _ask_host(self, row: SandboxRow, origin: Origin, seconds: float) -> calls.SandboxState:
        """Ask until it answers or the time is up: an agent that restarts in between makes it anew."""
        assert row.host_id is not None  # noqa: S101 - it was placed
        question = calls.CreateSandbox(
            sandbox_id=str(row.id),
            template=row.template,
            vcpus=row.vcpus,
            memory_mb=row.memory_mb,
            hostname=f"sb-{row.id.hex[:12]}",
            envs=dict(origin.envs),
            snapshot_id=None if origin.snapshot is None else str(origin.snapshot),
            keep_envs=origin.fork,
            timeout_sec=row.timeout_sec,
        )
        answer = await persist(
            self.links,
            row.host_id,
            "sandbox.create",
            calls.body_of(question),
            timeout=seconds,
            patience=seconds,
            check=partial(self.rows.check_unchanged, row),
        )
        return parse_answer(calls.SandboxState, answer)


def outcome(row: SandboxRow) -> SandboxRow:
    """The row of a sandbox that was made, whatever became of it since; raises when it was not."""
    if row.status == Status.ERROR and row.started_at is None:
        raise errors.HostUnavailable(row.reason or "the sandbox could not be started", retry_after=2)
    if row.status in {Status.STOPPING, Status.STOPPED} and row.started_at is None:
        raise errors.InvalidState("the sandbox was destroyed while it was being made", status=row.status)
    return row
