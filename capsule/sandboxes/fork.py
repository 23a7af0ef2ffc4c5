"""POST …/fork: a snapshot of the running source under a fresh id, children from it on the same host, the snapshot away.

Nothing is written down before the snapshot is there: if that fails, nothing was begun. From then on each child is a row
of its own that runs, fails, or is ended by the monitor like any other; a snapshot that nobody took away is collected.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog
import trio

from agent.wire import calls
from agent.wire.faults import Fault
from agent.wire.lifecycle import Status
from capsule import errors
from capsule.db.errors import ConstraintViolated, DatabaseUnavailable
from capsule.db.queries import idempotency
from capsule.db.translated import NO_ANSWER
from capsule.hosts.answers import parse_answer
from capsule.model import ForkFailure
from capsule.sandboxes.admission import fingerprint, same_request
from capsule.sandboxes.asking import persist
from capsule.sandboxes.children import Children, ForkRequest, admit, children, insert, shape
from capsule.sandboxes.create import REPLAY_PAUSE
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.rows import view
from capsule.sandboxes.start import Origin, outcome
from capsule.scheduler.placement import WishThere

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks
    from capsule.model import Forked
    from capsule.principals import Principal
    from capsule.sandboxes.operations import Operations
    from capsule.sandboxes.rows import SandboxRows
    from capsule.sandboxes.start import Starter
    from capsule.scheduler.scheduler import Scheduler

log = structlog.get_logger()

AT_ONCE = 8
"""Children of one fork that start at the same time."""
MAX_REPLAY_PAUSE = 2.0
MAX_SECONDS = 600.0
"""For all children together; less than the grace after which the monitor collects their snapshot."""


@dataclass(frozen=True, kw_only=True)
class Forker:
    """Multiplies running sandboxes."""

    rows: SandboxRows
    links: HostLinks
    starter: Starter
    scheduler: Scheduler
    operations: Operations
    settings: Settings

    async def fork(self, principal: Principal, sandbox: UUID, count: int, idempotency_key: str | None) -> list[Forked]:
        """Make `count` children; each is there or says why not. Goes on when the caller goes away."""
        request = ForkRequest(fork=sandbox, count=count)
        key = None if idempotency_key is None else (principal.team_id, idempotency_key, fingerprint(request))
        return await self.operations.finish(partial(self._fork, principal, request, idempotency_key), key=key)

    async def _fork(self, principal: Principal, request: ForkRequest, key: str | None) -> list[Forked]:
        earlier = await self._earlier(principal, request, key)
        if earlier is None:
            try:
                return await self._fork_anew(principal, request, key)
            except (errors.DatabaseUnavailable, errors.Busy):
                raise  # what is there by now may be our own, with nobody at work on it, or was waited for already
            except errors.CapsuleError as err:
                failure = err
            # What stood in the way may be the children of this very request, by way of another control plane.
            earlier = await self._earlier(principal, request, key)
            if earlier is None:
                raise failure
        return await self._await_outcomes(earlier, request.count)

    async def _earlier(self, principal: Principal, request: ForkRequest, key: str | None) -> UUID | None:
        """The fork that an earlier request with this key made."""
        claim = None if key is None else await self.rows.run(idempotency.get, principal.team_id, key)
        return None if claim is None else same_request(claim, request)

    async def _fork_anew(self, principal: Principal, request: ForkRequest, key: str | None) -> list[Forked]:
        source = await self.rows.transaction(admit, principal, request)
        seconds = min(MAX_SECONDS, self.settings.create_timeout * -(-request.count // AT_ONCE))
        new = Children(
            id=uuid4(), principal=principal, source=source, request=request, idempotency_key=key, seconds=seconds
        )
        with structlog.contextvars.bound_contextvars(fork_of=str(source.id), snapshot_id=str(new.id)):
            rows = await self._begin(new)
            if rows is None:  # another request with this key was quicker
                await self._remove_snapshot(new)
                claim = await self.rows.run(idempotency.get, principal.team_id, key or "")
                return [] if claim is None else await self._await_outcomes(claim.resource_id, request.count)
            items = await self._start_all(new, rows)
            await self._remove_snapshot(new)
            return items

    async def _begin(self, new: Children) -> list[SandboxRow] | None:
        """Room for all, the snapshot, the rows."""
        source = new.source
        want = shape(source).size().times(new.request.count)
        try:
            async with self.scheduler.reserve_there(WishThere(size=want, host=_host(source))):
                await self._make_snapshot(new)
                return await self._write_down(new)
        except ConstraintViolated as err:
            if err.name == "sandboxes_team_alive":
                raise errors.NoTeam("your team was deleted") from err
            raise
        except DatabaseUnavailable as err:
            raise errors.DatabaseUnavailable(NO_ANSWER, retry_after=1) from err
        except Fault as fault:
            log.warning("sandbox_not_forked", code=fault.code, message=fault.message)
            raise as_error(fault) from fault

    async def _write_down(self, new: Children) -> list[SandboxRow] | None:
        try:
            try:
                return await self.rows.patiently(insert, new)
            except ConstraintViolated as err:
                if err.name != "sandboxes_pkey":
                    raise
                return await self.rows.patiently(insert, new)  # an earlier try of ours was slow, and has committed
        except (errors.CapsuleError, ConstraintViolated) as err:
            failure = err
        await self._remove_snapshot(new)
        raise failure

    async def _make_snapshot(self, new: Children) -> None:
        question = calls.CreateSnapshot(snapshot_id=str(new.id), sandbox_id=str(new.source.id))
        answer = await persist(
            self.links,
            _host(new.source),
            "snapshot.create",
            calls.body_of(question),
            timeout=self.settings.pause_timeout,
            patience=self.settings.call_timeout,
            check=partial(self.rows.check_unchanged, new.source),
        )
        parse_answer(calls.SnapshotState, answer)

    async def _remove_snapshot(self, new: Children) -> None:
        """Its children have what they need; if the host cannot be told, the monitor collects it."""
        body = calls.body_of(calls.SnapshotRef(snapshot_id=str(new.id)))
        try:
            await self.links.call(_host(new.source), "snapshot.remove", body, timeout=self.settings.call_timeout)
        except Fault as fault:
            log.warning("snapshot_stays", code=fault.code, message=fault.message)

    async def _start_all(self, new: Children, rows: list[SandboxRow]) -> list[Forked]:
        items: dict[int, Forked] = {}
        places = trio.CapacityLimiter(AT_ONCE)
        deadline = trio.current_time() + new.seconds

        async def start(number: int, row: SandboxRow) -> None:
            async with places:
                left = max(deadline - trio.current_time(), 1.0)
                try:
                    items[number] = view(
                        await self.starter.start(row, Origin(snapshot=new.id, fork=True), seconds=left)
                    )
                except errors.CapsuleError as err:
                    items[number] = ForkFailure(err.code, err.message)
                except Exception:
                    log.exception("child_failed", sandbox_id=str(row.id))
                    items[number] = ForkFailure(errors.Internal.code, "internal error; the log has the details")

        async with trio.open_nursery() as nursery:
            for number, row in enumerate(rows):
                nursery.start_soon(start, number, row)
        return [items[number] for number in range(len(rows))]

    async def _await_outcomes(self, fork: UUID, count: int) -> list[Forked]:
        """What became of the children of an earlier request: whoever makes them, or the monitor, brings each to its
        end."""
        deadline = trio.current_time() + MAX_SECONDS + self.settings.pause_timeout
        pause = REPLAY_PAUSE
        while True:
            rows = await self.rows.run(children, fork, count)
            if not any(row.status in {Status.PENDING, Status.STARTING} for row in rows):
                return [_item(row) for row in rows]
            if trio.current_time() >= deadline:
                raise errors.Busy("the sandboxes are still being made; ask again", retry_after=5)
            await trio.sleep(pause)
            pause = min(2 * pause, MAX_REPLAY_PAUSE)


def _item(row: SandboxRow) -> Forked:
    try:
        return view(outcome(row))
    except errors.CapsuleError as err:
        return ForkFailure(err.code, err.message)


def _host(row: SandboxRow) -> UUID:
    assert row.host_id is not None  # noqa: S101 - it runs there
    return row.host_id
