"""The monitor of one control plane: leads or waits to lead; follows every host; looks after hosts that fall silent.

Owns: a `HostFollower` per live host, while it leads. Owned by: the control plane's nursery.
Takes: nothing. Emits: statuses of hosts, `missing` rows, ends of rows that nobody finished, audit rows.
Dies when: the control plane stops. Losing the lead (advisory lock) ends the followers; another control plane goes on.
A leader that stalls loses it, and writes nothing more: all goes through a LedDatabase.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVarTuple

import structlog
import trio

from agent.actor.supervise import RestartPolicy, supervise
from agent.wire.lifecycle import Status
from capsule.db.errors import ConstraintViolated, DatabaseUnavailable
from capsule.db.led import LedDatabase
from capsule.db.queries import audit, fleet, hosts, idempotency, rate_limits, sandboxes, sessions
from capsule.monitor.host import HostFollower
from capsule.monitor.silence import Silence

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.lease import Lease
    from capsule.db.pool import Database
    from capsule.db.queries.hosts import HostRow
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks
    from capsule.monitor.drain import Pause

log = structlog.get_logger()

Ts = TypeVarTuple("Ts")

LEAD_KEY = "monitor"
INTERVAL = 5.0
OVERDUE_MARGIN = timedelta(seconds=10)
"""Beyond a row's own deadline: whoever works on it has given up by then."""
LISTED_WITHIN = 30.0
"""Seconds since its last listing in which a host without heartbeats is not taken for one that is away."""
AFTER_A_BUG = RestartPolicy(restarts=5, within=120.0)
"""Beyond that the control plane ends: one that looks after nothing must not look well."""
BECOMES_MISSING = frozenset({Status.RUNNING, Status.PAUSING, Status.RESUMING})


class Monitor:
    """See the module's docstring."""

    def __init__(self, db: Database, links: HostLinks, settings: Settings, *, pause: Pause | None = None) -> None:
        """`pause` puts what runs on a host that is drained to rest."""
        self._db = self._led = db
        self._links = links
        self._silence = Silence(settings.heartbeat_timeout)
        self._pause = pause
        self._followers: dict[UUID, tuple[trio.CancelScope, HostFollower]] = {}
        self._told_down: dict[UUID, bool] = {}
        """What the trail has of hosts that are drained, as far as we know."""
        self.leading = False
        self._nudged = trio.Event()

    async def run(self) -> None:
        """Lead whenever nobody else does; until cancelled. TooManyFailures when a bug keeps it from that."""
        await supervise("monitor", self._lead_always, AFTER_A_BUG)

    async def _lead_always(self) -> None:
        while True:
            try:
                lease = await self._db.try_lead(LEAD_KEY)
            except DatabaseUnavailable:
                lease = None
            if lease is not None:
                async with lease:
                    await self._lead(lease)
            await trio.sleep(INTERVAL / 5)

    async def _lead(self, lease: Lease) -> None:
        log.info("monitor_leads")
        self.leading = True
        self._led = LedDatabase(self._db, lease)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lease.keep)
                nursery.start_soon(self._keep_watch, nursery)
                await lease.lost.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.leading = False
            self._followers.clear()
            log.info("monitor_leads_no_more")

    async def _keep_watch(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                await self._look(nursery)
            except DatabaseUnavailable as err:
                log.warning("monitor_round_failed", reason=str(err))
            with trio.move_on_after(INTERVAL):
                await self._nudged.wait()
            self._nudged = trio.Event()

    def nudge(self) -> None:
        """A host registered: look at once."""
        self._nudged.set()

    async def _look(self, nursery: trio.Nursery) -> None:
        """One round over all hosts and all overdue rows; one that the database refuses does not hold up the others."""
        live = await self._led.run(_registered)
        self._silence.look(live)
        self._follow(live, nursery)
        await self._tell_of_draining(live)
        for host in live:
            if (status := self._verdict(host)) != host.status:
                await self._write(_mark, host, status)
            elif (host.status == "unreachable" or self._silence.is_lost(host.id)) and not self._lists(host.id):
                await self._write(_sweep, host)
        for row in await self._led.run(sandboxes.overdue, datetime.now(UTC) - OVERDUE_MARGIN):
            await self._write(_end_overdue, row)
        for host_id in await self._led.run(fleet.removals_due, datetime.now(UTC)):
            log.warning("host_removal_finished", host_id=str(host_id))
            await self._write(fleet.finish_removal, host_id)
        for prune in (idempotency.prune, sessions.prune, rate_limits.prune):
            await self._write(prune)

    async def _tell_of_draining(self, live: list[HostRow]) -> None:
        """One that is drained keeps its status when it goes away or comes back; the trail has it all the same."""
        draining = {host.id: host for host in live if host.status == "draining"}
        self._told_down = {one: down for one, down in self._told_down.items() if one in draining}
        for host in draining.values():
            down = self._silence.is_lost(host.id)
            if (down or self._silence.is_heard(host.id)) and self._told_down.get(host.id) != down:
                await self._write(_tell, host, down)
                self._told_down[host.id] = down

    async def _write(self, fn: Callable[[Connection, *Ts], Awaitable[None]], *args: *Ts) -> None:
        try:
            await self._led.transaction(fn, *args)
        except ConstraintViolated as err:
            log.warning("monitor_write_refused", constraint=err.name)

    def _follow(self, live: list[HostRow], nursery: trio.Nursery) -> None:
        """A follower for each host that can be dialled; a fresh one, without a pause, for one that registered anew."""
        epochs = {host.id: host.credential_epoch for host in live if host.credentials_revoked_at is None}
        for host, (scope, follower) in list(self._followers.items()):
            if epochs.get(host) != follower.epoch:
                del self._followers[host]
                scope.cancel()
        for host, epoch in epochs.items():
            if host not in self._followers:
                follower = HostFollower(host, self._led, self._links, epoch=epoch, pause=self._pause)
                scope, _ = self._followers[host] = trio.CancelScope(), follower
                nursery.start_soon(_run_in, scope, follower)

    def _lists(self, host: UUID) -> bool:
        """Whether a host that does not beat tells us all the same what it has: its follower keeps its rows true."""
        followed = self._followers.get(host)
        return followed is not None and trio.current_time() - followed[1].listed_at < LISTED_WITHIN

    def _verdict(self, host: HostRow) -> str:
        """The status a host should have: one that is silent is unreachable, one that is heard again is online if it is
        proven to be where it says. One that is drained stays so."""
        if host.status == "online" and self._silence.is_lost(host.id):
            return "unreachable"
        back = host.status == "unreachable" and host.proven and self._silence.is_heard(host.id)
        return "online" if back else host.status


async def _run_in(scope: trio.CancelScope, follower: HostFollower) -> None:
    with scope:
        await follower.run()


async def _registered(connection: Connection) -> list[HostRow]:
    return [host for host in await hosts.list_all(connection) if host.address is not None]


async def _mark(tx: Connection, host: HostRow, status: str) -> None:
    """Change a host's status; a host that went away takes its live sandboxes to `missing`."""
    changed = await hosts.mark_status(
        tx, host.id, from_status=host.status, generation=host.generation, to_status=status
    )
    if changed is None:
        return
    down = status == "unreachable"
    await _note(tx, host, down)
    log.warning("host_status", host_id=str(host.id), status=status)
    if down:
        await _sweep(tx, host)


async def _tell(tx: Connection, host: HostRow, down: bool) -> None:
    """Unless an earlier leader did."""
    if await hosts.is_told_down(tx, host.id, host.team_id) != down:
        await _note(tx, host, down)


async def _note(tx: Connection, host: HostRow, down: bool) -> None:
    await audit.append(
        tx,
        actor_type="system",
        actor_id=None,
        actor_name="monitor",
        team_id=host.team_id,
        resource_type="host",
        resource_id=f"host-{host.id}",
        action="marked_down" if down else "marked_up",
        scope="admin",
        status="error" if down else "success",
    )


async def _sweep(tx: Connection, host: HostRow) -> None:
    """Nobody knows of the sandboxes of a host that is away; also of those that somebody brought there a moment late.
    One that was heard since it was looked at is not away: what runs there may have been brought there after that."""
    now = await hosts.hold(tx, host.id)
    if now is None or now.status == "online" or now.last_heartbeat != host.last_heartbeat:
        return
    for row in await sandboxes.on_host(tx, host.id):
        if row.status in BECOMES_MISSING:
            await _change(tx, row, Status.MISSING, f"its host was last heard at {host.last_heartbeat}")


async def _end_overdue(tx: Connection, row: SandboxRow) -> None:
    """A row whose maker is gone and that no host knows (a host that does has made it running long before)."""
    if row.status in {Status.PENDING, Status.STARTING}:
        await _change(tx, row, Status.ERROR, "it was not started in time")
    elif row.status == Status.STOPPING and row.host_id is None:
        await _change(tx, row, Status.STOPPED, None)


async def _change(tx: Connection, row: SandboxRow, to_status: Status, reason: str | None) -> None:
    log.warning("row_reconciled", sandbox_id=str(row.id), from_status=row.status, to_status=to_status, reason=reason)
    await sandboxes.change_status(
        tx, row.id, from_status=row.status, generation=row.generation, to_status=to_status, reason=reason
    )
