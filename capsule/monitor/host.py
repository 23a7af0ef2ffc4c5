"""Follows one host: proves that it is where it says; then a listing at once, at every change the agent tells of, and
every few seconds anyway.

Owns: the watch stream to its agent, the endings it asked for, the memory of strangers it saw. Owned by: the monitor's
nursery. Takes: nothing; the agent's notices and the clock are its input. Emits: a host's coming online, changed rows,
acknowledgements, destroys, removals of snapshots, pauses on a host that is drained. Dies when: the monitor ends it (the
host is gone or registered anew, or another control plane leads). It has nothing to lose.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec
import structlog
import trio

from agent.actor.supervise import RestartPolicy, supervise
from agent.wire import calls
from agent.wire.faults import Fault
from agent.wire.lifecycle import FINAL, TRANSITIONAL, Status
from capsule.db.errors import ConstraintViolated, DatabaseUnavailable
from capsule.db.queries import audit, sandboxes, templates
from capsule.hosts.answers import parse_answer
from capsule.monitor.contained import contained
from capsule.monitor.copies import CopyKeeper
from capsule.monitor.drain import Drainer
from capsule.monitor.news import News
from capsule.monitor.proof import prove_address
from capsule.monitor.reconcile import Change, DestroyAgain, Readdress, only_copy, plan, settled, strangers

if TYPE_CHECKING:
    from agent.wire.calls import HostListing, OutboxEntry
    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks
    from capsule.monitor.drain import Pause

log = structlog.get_logger()

INTERVAL = 5.0
"""Seconds between listings that nothing asked for."""
RETRY_PAUSE = 1.0
RACE_PAUSE = 0.1
"""Before looking again when a row was changed under our hands."""
CALL_TIMEOUT = 10.0
STRANGER_GRACE = 30.0
"""How long a VM without a row may stay: a row may be committed after the host was told, never long after."""
RESTING_GRACE = 900.0
"""The same for one that rests and never was anybody's: it costs nothing but disk."""
MAX_AT_ONCE = 200
"""Strangers, outbox entries and endings looked after in one round: a host that invents some costs no more than that."""
AFTER_A_BUG = RestartPolicy(first_delay=1.0, max_delay=60.0)
"""One host that we cannot follow must not keep us from the others."""


class HostFollower:
    """See the module's docstring."""

    def __init__(
        self, host: UUID, db: Database, links: HostLinks, *, epoch: int = 0, pause: Pause | None = None
    ) -> None:
        """`epoch`: the registration of the host that we begin with. `pause` None: it is not drained."""
        self._host = host
        self.epoch = epoch
        self._db = db
        self._links = links
        self._strangers: dict[UUID, float] = {}
        self._kept: set[UUID] = set()
        self._ending: set[UUID] = set()
        self._copies = CopyKeeper(host, db, links)
        self._drainer = None if pause is None else Drainer(host, db, pause)
        self.listed_at = trio.current_time()
        """When its last listing came; at first, when we began."""

    async def run(self) -> None:
        """Until cancelled."""
        with structlog.contextvars.bound_contextvars(host_id=str(self._host)):
            async with trio.open_nursery() as endings:
                await supervise("host_follower", lambda: self._follow_always(endings), AFTER_A_BUG)

    async def _follow_always(self, endings: trio.Nursery) -> None:
        while True:
            try:
                await self._follow(endings)
            except Fault as fault:
                log.info("host_not_followed", code=fault.code, message=fault.message)
            except DatabaseUnavailable as err:
                log.info("host_not_followed", reason=str(err))
            await trio.sleep(RETRY_PAUSE)

    async def _follow(self, endings: trio.Nursery) -> None:
        """Hold the watch stream; reconcile on every notice and every interval. Ends with a Fault, or quietly."""
        if not await prove_address(self._host, self._db, self._links):
            return
        await self._learn_templates()
        failure: Exception | None = None
        async with self._links.open_stream(self._host, "host.watch", {}) as stream:
            news = News()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(news.listen, stream)
                try:
                    while await news.wait(INTERVAL):
                        if not await self._reconcile(endings):
                            await trio.sleep(RACE_PAUSE)
                            news.tell()
                except (Fault, DatabaseUnavailable) as err:
                    failure = err
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
            await stream.reply()

    async def _learn_templates(self) -> None:
        """The base images that this host has are everyone's."""
        answer = await self._links.call(self._host, "host.describe", {}, timeout=CALL_TIMEOUT)
        for image in parse_answer(calls.HostDescription, answer).templates:
            try:
                name = msgspec.convert(image.name, calls.TemplateName)
                await self._db.transaction(_upsert_base, name, image.size_bytes)
            except (msgspec.ValidationError, ConstraintViolated) as err:
                log.warning("template_refused", template=image.name, reason=str(err))

    async def _reconcile(self, endings: trio.Nursery) -> bool:
        """One round; False when the outbox has news that is not in the rows yet."""
        rows = await self._db.run(sandboxes.on_host, self._host)
        copies = await self._copies.read()
        answer = await self._links.call(self._host, "host.list", {}, timeout=CALL_TIMEOUT)
        listing = parse_answer(calls.HostListing, answer)
        self.listed_at = trio.current_time()
        for step in plan(rows, listing, datetime.now(UTC)):
            match step:
                case Change():
                    await self._apply(step)
                case Readdress(row=row, host_ip=host_ip):
                    await self._db.run(sandboxes.correct_address, row.id, row.generation, host_ip)
                case DestroyAgain(row=row):
                    self._end(row.id, "its row is stopping", endings)
        await self._end_strangers(strangers(rows, listing), {UUID(one) for one in listing.paused}, endings)
        await self._copies.compare(copies, listing, endings)
        if self._drainer is not None:
            await self._drainer.look(rows, endings)
        return await self._acknowledge(listing)

    async def _apply(self, step: Change) -> None:
        try:
            await self._db.transaction(_change, step)
        except ConstraintViolated as err:
            log.warning("row_not_reconciled", sandbox_id=str(step.row.id), constraint=err.name)

    async def _acknowledge(self, listing: HostListing) -> bool:
        """Let go of the entries, from the oldest on, that the rows do not need any more; False when some are left."""
        entries = sorted(listing.outbox, key=lambda entry: entry.sequence)[:MAX_AT_ONCE]
        if not entries:
            return True
        rows = await self._db.run(sandboxes.get_many, {UUID(entry.sandbox_id) for entry in entries})
        resting = frozenset(listing.paused)
        done: list[OutboxEntry] = []
        for entry in entries:
            row = rows.get(UUID(entry.sandbox_id))
            if not settled(entry, row, self._host, rests=entry.sandbox_id in resting):
                break
            done.append(entry)
        if done:
            _report(done)
            body = calls.body_of(calls.Acknowledge(sequence=done[-1].sequence))
            await self._links.call(self._host, "host.acknowledge", body, timeout=CALL_TIMEOUT)
        return len(done) == len(listing.outbox)

    async def _end_strangers(self, found: set[UUID], resting: set[UUID], endings: trio.Nursery) -> None:
        """End sandboxes that no row needs: at once when the row has ended, after a grace when there is none. What rests
        is the only copy of something: it stays, unless a user ended it or it never was anybody's."""
        now = trio.current_time()
        self._kept &= found
        first = sorted(found, key=lambda one: (one in self._kept, one in resting, one not in self._strangers, one))
        self._strangers = {one: self._strangers.get(one, now) for one in first[:MAX_AT_ONCE]}
        rows = await self._db.run(sandboxes.get_many, self._strangers.keys()) if self._strangers else {}
        for sandbox, since in self._strangers.items():
            row = rows.get(sandbox)
            if row is not None and row.status not in FINAL and row.host_id == self._host:
                continue  # committed after the rows were read
            if sandbox in resting and only_copy(row):
                self._keep("stray_rest_kept", sandbox, row.status if row else None)
                continue
            if row is not None and row.status not in FINAL and row.started_at is not None and sandbox not in resting:
                # The leftover of a create that was moved; or the VM itself, on a machine that is another host by now.
                if sandbox not in self._kept or now - since >= STRANGER_GRACE:
                    self._end(sandbox, "it lives on another host", endings, elsewhere=row)
                continue
            grace = RESTING_GRACE if sandbox in resting else STRANGER_GRACE
            meant = row is not None and (row.status == Status.STOPPED or sandbox not in resting)
            if meant or now - since >= grace:
                self._end(sandbox, "its row has ended" if row else "it has no row", endings)

    def _keep(self, event: str, sandbox: UUID, status: str | None) -> None:
        """Said once; only people can tell what it is for."""
        if sandbox not in self._kept:
            self._kept.add(sandbox)
            log.warning(event, sandbox_id=str(sandbox), status=status)

    def _end(self, sandbox: UUID, why: str, endings: trio.Nursery, elsewhere: SandboxRow | None = None) -> None:
        """Beside everything else: one that does not end must not hold up the rows of the others."""
        if sandbox not in self._ending and len(self._ending) < MAX_AT_ONCE:
            self._ending.add(sandbox)
            endings.start_soon(self._destroy, sandbox, why, elsewhere)

    @contained
    async def _destroy(self, sandbox: UUID, why: str, elsewhere: SandboxRow | None) -> None:
        """`elsewhere`: the row that says so; only if its host says so, too."""
        body = calls.body_of(calls.SandboxRef(sandbox_id=str(sandbox)))
        try:
            if elsewhere is not None and not await self._is_at(elsewhere.host_id, sandbox):
                self._keep("stray_vm_kept", sandbox, elsewhere.status)
                self._strangers[sandbox] = trio.current_time()  # asked again after another grace
                return
            log.warning("stray_vm_destroyed", sandbox_id=str(sandbox), why=why)
            await self._links.call(self._host, "sandbox.destroy", body, timeout=CALL_TIMEOUT)
        except Fault as fault:
            log.warning("stray_vm_stays", sandbox_id=str(sandbox), code=fault.code, message=fault.message)
        finally:
            self._ending.discard(sandbox)

    async def _is_at(self, host: UUID | None, sandbox: UUID) -> bool:
        """Whether another host says that it has it; one that does not answer says nothing."""
        if host is None:
            return False
        try:
            answer = await self._links.call(host, "host.list", {}, timeout=CALL_TIMEOUT)
            listing = parse_answer(calls.HostListing, answer)
        except Fault:
            return False
        return sandbox in {UUID(one) for one in (*(vm.sandbox_id for vm in listing.sandboxes), *listing.paused)}


async def _upsert_base(tx: Connection, name: str, size_bytes: int) -> None:
    await templates.upsert_base(tx, name=name, size_bytes=min(max(size_bytes, 0), 2**63 - 1))


async def _change(tx: Connection, step: Change) -> None:
    """One or two compare-and-sets; what the host paused or resumed by itself goes into the audit trail."""
    row: SandboxRow | None = step.row
    for status in (step.via, step.to_status):
        if status is not None and row is not None:
            row = await sandboxes.change_status(
                tx,
                row.id,
                from_status=row.status,
                generation=row.generation,
                to_status=status,
                transition_deadline=datetime.now(UTC) if status in TRANSITIONAL else None,
                host_ip=step.host_ip if status == step.to_status else None,
                reason=step.reason,
            )
    if row is None:
        return
    await _record(tx, step)
    log.warning(
        "row_reconciled",
        sandbox_id=str(step.row.id),
        from_status=step.row.status,
        to_status=step.to_status,
        reason=step.reason,
    )


async def _record(tx: Connection, step: Change) -> None:
    row = step.row
    rested = row.status == Status.RESUMING or (row.status == Status.MISSING and row.host_ip is None)
    if step.to_status == Status.PAUSED and not rested:
        reason = {"reason": step.reason or ""}
        await audit.append_system(tx, row.team_id, row.id, action="pause", status="info", metadata=reason)
    elif step.to_status == Status.RUNNING and row.status in {Status.PAUSED, Status.RESUMING}:
        template = {"template": row.template}
        await audit.append_system(tx, row.team_id, row.id, action="resume", status="success", metadata=template)


def _report(entries: list[OutboxEntry]) -> None:
    """Log what has no other place: that a host could not pause an idle sandbox, which runs on."""
    for entry in entries:
        if entry.event == "pause_failed":
            log.warning("auto_pause_failed", sandbox_id=entry.sandbox_id, reason=entry.reason)
