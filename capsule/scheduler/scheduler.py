"""The scheduler: finds a host for a sandbox and holds its place until the sandbox's row says where it is.

Owns: the reservations made since, and the last host chosen. Owned by: the control plane's main nursery.
Takes: `reserve`, from any task. Requests that wait together are placed with one look at the database.
Emits: nothing else; `statistics()`.
Dies when: cancelled. Reservations die with it; by then rows tell all, or the sandboxes were not made.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import trio

from agent.actor.mailbox import Mailbox, ReplySlot
from agent.wire.calls import VMM_MEMORY_MB
from capsule.db.queries import hosts as host_rows
from capsule.db.queries import sandboxes as sandbox_rows
from capsule.errors import NoHostsAvailable
from capsule.scheduler.placement import HostLoad, Refusal, RoundRobin, Size, Wish, choose

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from uuid import UUID

    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.scheduler.placement import Overcommit, Strategy, WishThere

REQUESTS_WAITING = 4096
"""More creates than this at once are Busy: each waits for its turn at the same few hosts."""

SETTLING_TIME = 2.0
"""Seconds a request waits, when only reservations stand in its way, for them to become rows or go: until then a place
may be counted twice, as a reservation and as a row."""

RETRY_AFTER = 5.0
"""Seconds we tell a client to wait for room."""


@dataclass(eq=False, slots=True)
class Reservation:
    """A place on `host` for `wish`, from the answer until `closed`."""

    wish: Wish | WishThere
    host: UUID | None = None
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Answer to one request. `transient`: without the reservations it would have fitted."""

    refusal: Refusal | None
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """Asks for a place for `reservation`."""

    reservation: Reservation
    verdict: ReplySlot[Verdict] = field(default_factory=ReplySlot)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStatistics:
    """Figures since the start, but `held`, which is now."""

    held: int
    placed: int
    refused: int
    looks: int


class Scheduler:
    """See the module's docstring. `read` looks at the database, which knows nothing of reservations; `strategy` picks
    among hosts that fit."""

    def __init__(self, read: Callable[[], Awaitable[Sequence[HostLoad]]], *, strategy: Strategy | None = None) -> None:
        self._read = read
        self._strategy = strategy or RoundRobin()
        self._requests = Mailbox[Request]("the scheduler", REQUESTS_WAITING)
        self._held: set[Reservation] = set()
        self._released = trio.Event()
        self._last: UUID | None = None
        self._placed = self._refused = self._looks = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Place requests until cancelled."""
        task_status.started()
        while True:
            requests = [await self._requests.receive()]
            while self._requests.statistics().waiting:
                requests.append(await self._requests.receive())
            await self._place(requests)

    @asynccontextmanager
    async def reserve(self, wish: Wish) -> AsyncIterator[UUID]:
        """A host with room for `wish`, held for the length of the block: write the sandbox's row, with the host in it,
        inside. Raises NoHostsAvailable, which says what was short; Busy; DatabaseUnavailable."""
        reservation = Reservation(wish)
        try:
            yield await self._obtain(reservation)
        finally:
            self._release(reservation)

    @asynccontextmanager
    async def reserve_there(self, wish: WishThere) -> AsyncIterator[None]:
        """The same on a certain host, for more of what is there. The error's `limits` are `hosts` when it is not
        online."""
        reservation = Reservation(wish)
        try:
            await self._obtain(reservation)
            yield
        finally:
            self._release(reservation)

    def statistics(self) -> SchedulerStatistics:
        """Figures for /metrics."""
        return SchedulerStatistics(held=len(self._held), placed=self._placed, refused=self._refused, looks=self._looks)

    async def _obtain(self, reservation: Reservation) -> UUID:
        give_up_at = trio.current_time() + SETTLING_TIME
        while True:
            released = self._released
            request = Request(reservation)
            self._requests.send_nowait(request)
            verdict = await request.verdict.wait()
            if reservation.host is not None:
                return reservation.host
            if verdict.refusal is not None and (not verdict.transient or trio.current_time() >= give_up_at):
                self._refused += 1
                message = reservation.wish.explain(verdict.refusal)
                raise NoHostsAvailable(message, retry_after=RETRY_AFTER, limits=list(verdict.refusal.limits))
            with trio.move_on_at(give_up_at):
                await released.wait()

    def _release(self, reservation: Reservation) -> None:
        """Also when the asker went away before its answer came: `closed` keeps the place from being taken then."""
        reservation.closed = True
        self._held.discard(reservation)
        self._released.set()
        self._released = trio.Event()

    async def _place(self, requests: list[Request]) -> None:
        # A reservation that ends while the database is being read may or may not be among the rows read: it counts.
        held = set(self._held)
        try:
            fleet = await self._read()
        except Exception as err:  # noqa: BLE001 - every asker gets it, whatever it is
            for request in requests:
                request.verdict.fail(err)
            return
        self._looks += 1
        reserved = _by_host(held)
        for request in requests:
            self._place_one(request, fleet, reserved)

    def _place_one(self, request: Request, fleet: Sequence[HostLoad], reserved: dict[UUID, Size]) -> None:
        reservation = request.reservation
        if reservation.closed:
            return
        wish = reservation.wish
        look = partial(choose, wish=wish, strategy=self._strategy, last=self._last)
        chosen = look([host.plus(reserved[host.id]) if host.id in reserved else host for host in fleet])
        if isinstance(chosen, Refusal):
            request.verdict.answer(Verdict(chosen, transient=not isinstance(look(fleet), Refusal)))
            return
        reserved[chosen] = reserved.get(chosen, Size()) + wish.size
        reservation.host = chosen
        if isinstance(wish, Wish):  # else there was no choice
            self._last = chosen
        self._held.add(reservation)
        self._placed += 1
        request.verdict.answer(Verdict(None))


def fleet_reader(db: Database, overcommit: Overcommit) -> Callable[[], Awaitable[list[HostLoad]]]:
    """Looks at the hosts that are online, and at what their sandboxes hold; cordoned ones are closed."""
    return partial(db.run, partial(_read_fleet, overcommit=overcommit))


async def _read_fleet(tx: Connection, *, overcommit: Overcommit) -> list[HostLoad]:
    online = await host_rows.list_all(tx, statuses=["online"])
    sold = {row.host_id: _sold(row) for row in await sandbox_rows.reserved_by_host(tx)}
    return [
        HostLoad(
            id=host.id,
            limit=overcommit.limit(_size(host)),
            sold=sold.get(host.id, Size()),
            team=host.team_id,
            tags=frozenset(host.tags),
            closed=host.cordoned,
        )
        for host in online
    ]


def _size(host: host_rows.HostRow) -> Size:
    return Size(vcpus=host.cpu_cores or 0, memory_mb=host.memory_mb or 0, disk_mb=(host.disk_gb or 0) * 1024)


def _sold(row: sandbox_rows.HostReservation) -> Size:
    """Paused sandboxes hold their disk and, since some will be resumed here, half of the rest; VMs cost their VMM."""
    return Size(
        vcpus=row.vcpus + -(-row.paused_vcpus // 2),
        memory_mb=row.memory_mb + -(-row.paused_memory_mb // 2) + row.sandboxes * VMM_MEMORY_MB,
        disk_mb=row.disk_mb,
    )


def _by_host(reservations: set[Reservation]) -> dict[UUID, Size]:
    sums: dict[UUID, Size] = defaultdict(Size)
    for reservation in reservations:
        if reservation.host is not None:
            sums[reservation.host] += reservation.wish.size
    return sums
