"""POST /v1/sandboxes: reserve a host, one transaction, tell the host, one compare-and-set.

Every step may be the last: the row is there before the host hears of it, the host makes the same sandbox for the same
id however often it is asked, and a row that nobody finishes is finished by the monitor from the host's listing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from agent.wire.faults import Fault
from agent.wire.lifecycle import Status
from capsule import errors
from capsule.db.errors import ConstraintViolated, DatabaseUnavailable
from capsule.db.queries import idempotency, sandboxes
from capsule.db.translated import NO_ANSWER
from capsule.sandboxes.admission import HostClosed, NewSandbox, examine, insert, same_request, shape_of
from capsule.sandboxes.elsewhere import Elsewhere
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.rows import found, view
from capsule.sandboxes.start import Origin, outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from capsule.config import Settings
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.model import CreateSandbox, SandboxView
    from capsule.principals import Principal
    from capsule.sandboxes.operations import Operations
    from capsule.sandboxes.rows import SandboxRows
    from capsule.sandboxes.start import Starter
    from capsule.scheduler.placement import Wish
    from capsule.scheduler.scheduler import Scheduler

REPLAY_PAUSE = 0.25


@dataclass(frozen=True, kw_only=True)
class Creator:
    """Makes sandboxes."""

    rows: SandboxRows
    starter: Starter
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
        return await (self._start(row, request) if mine else self._resume(row.id, request))

    async def _start(self, row: SandboxRow, request: CreateSandbox) -> SandboxRow:
        origin = Origin(snapshot=row.template_id, envs=request.envs)
        elsewhere = Elsewhere(self.rows, self.starter.links, self.scheduler)
        now = await self.starter.start(row, origin, seconds=self.settings.create_timeout, elsewhere=elsewhere.move)
        return now if now.status != Status.STARTING else await self._await_outcome(row.id)

    async def _resume(self, sandbox: UUID, request: CreateSandbox) -> SandboxRow:
        """Finish what an earlier request with this key began: whoever works on it may have died with its process. The
        host makes the same sandbox for the same id, and the outcome is written once."""
        row = found(await self.rows.run(sandboxes.get_any, sandbox))
        if row.status != Status.STARTING:
            return await self._await_outcome(sandbox)
        return await self._start(row, request)

    async def _place(self, principal: Principal, request: CreateSandbox, key: str | None) -> tuple[SandboxRow, bool]:
        """The row, on a host with room for it, and whether it is this request's to start."""
        shape = await self.rows.run(shape_of, principal, request, self.settings.disk_mb)
        try:
            return await self._reserve(partial(NewSandbox, principal, request, key, shape), shape.wish())
        except errors.NoHostsAvailable as err:
            full = err
        except DatabaseUnavailable as err:
            raise errors.DatabaseUnavailable(NO_ANSWER, retry_after=1) from err
        except Fault as fault:
            raise as_error(fault) from fault
        # That the fleet is full is of no interest to a repeated request, nor to one that would be refused anyway.
        row = await self.rows.transaction(examine, principal, request, shape, key)
        if row is None:
            raise full
        return row, False

    async def _reserve(self, new: Callable[[UUID, Settings], NewSandbox], wish: Wish) -> tuple[SandboxRow, bool]:
        """The row, on the first host with room that is still open when it is written down."""
        while True:
            async with self.scheduler.reserve(wish) as host:
                try:
                    return await self._begin(new(host, self.settings))
                except HostClosed:
                    wish = replace(wish, refused=wish.refused | {host})

    async def _begin(self, new: NewSandbox) -> tuple[SandboxRow, bool]:
        try:
            return await self.rows.transaction(insert, new)
        except ConstraintViolated as err:
            if err.name == "sandboxes_team_alive":
                raise errors.NoTeam("your team was deleted") from err
            raise

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
                return outcome(row)
            if trio.current_time() >= deadline:
                raise errors.Busy("the sandbox is still being made; ask again", retry_after=5)
            await trio.sleep(REPLAY_PAUSE)
