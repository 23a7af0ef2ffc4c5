"""What to do about one host: a pure function of its rows, read first, and its listing, asked for afterwards.

Every step is a compare-and-set on the row as it was read, so a row that somebody changed meanwhile is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from agent.wire.lifecycle import Status
from capsule.hosts.answers import storable_address, storable_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.wire.calls import HostListing, OutboxEntry, SandboxState
    from capsule.db.queries.sandboxes import SandboxRow


@dataclass(frozen=True, slots=True)
class Change:
    """Bring a row to `to_status`, through `via` where there is no step that leads there."""

    row: SandboxRow
    to_status: Status
    host_ip: str | None = None
    reason: str | None = None
    via: Status | None = None


@dataclass(frozen=True, slots=True)
class DestroyAgain:
    """Somebody gave up half-way: tell the host once more to end this sandbox."""

    row: SandboxRow


@dataclass(frozen=True, slots=True)
class Readdress:
    """It runs, as the row says, but elsewhere on its host."""

    row: SandboxRow
    host_ip: str


Step = Change | DestroyAgain | Readdress


@dataclass(frozen=True, slots=True)
class Facts:
    """What a host says of one sandbox: it as it lives, whether it rests, and what the outbox tells."""

    vm: SandboxState | None = None
    rests: bool = False
    ended: OutboxEntry | None = None
    paused: OutboxEntry | None = None

    @property
    def runs(self) -> bool:
        """It lives, and is on its way nowhere."""
        return self.vm is not None and self.vm.status == Status.RUNNING

    @property
    def absent(self) -> bool:
        """The host does not have it."""
        return self.vm is None and not self.rests


NOTHING = Facts()
ENDING = frozenset({"died", "destroyed"})
ENDED_BY_ENTRY = frozenset(
    {Status.STARTING, Status.RUNNING, Status.PAUSING, Status.PAUSED, Status.RESUMING, Status.MISSING}
)
"""Whatever of these the host says it lost, is lost: unless it rests there."""
PAUSED_BY_ENTRY = frozenset({Status.STARTING, Status.RUNNING, Status.MISSING})
"""Rows that learn from an entry why they rest; the others have been told, or are being told by whoever works on
them."""
REST_LOST_AFTER = timedelta(hours=24)
"""How long what rested may be absent before its row is given up: a record that cannot be read for a while is no end."""


def plan(rows: Iterable[SandboxRow], listing: HostListing, now: datetime) -> list[Step]:
    """Steps for the rows of one host (those that live or rest there)."""
    facts = facts_of(listing)
    steps = (_step(row, facts.get(row.id, NOTHING), now) for row in rows)
    return [step for step in steps if step is not None]


def facts_of(listing: HostListing) -> dict[UUID, Facts]:
    """By sandbox. One that is both alive and at rest (which no sound host says) is alive; the latest entry counts."""
    alive = {UUID(state.sandbox_id): state for state in listing.sandboxes}
    resting = {UUID(one) for one in listing.paused} - alive.keys()
    entries = sorted(listing.outbox, key=lambda entry: entry.sequence)
    ended = {UUID(entry.sandbox_id): entry for entry in entries if entry.event in ENDING}
    paused = {UUID(entry.sandbox_id): entry for entry in entries if entry.event == "auto_paused"}
    return {
        one: Facts(alive.get(one), one in resting, ended.get(one), paused.get(one))
        for one in alive.keys() | resting | ended.keys() | paused.keys()
    }


def strangers(rows: Iterable[SandboxRow], listing: HostListing) -> set[UUID]:
    """Sandboxes on the host, alive or at rest, that none of its rows speaks of."""
    there = {UUID(state.sandbox_id) for state in listing.sandboxes} | {UUID(one) for one in listing.paused}
    return there - {row.id for row in rows}


def only_copy(row: SandboxRow | None) -> bool:
    """Whether what rests on a host must stay there, `row` being all that is known of it: unless a user ended it, or it
    never was anybody's, nothing of it is anywhere else."""
    if row is None:
        return True
    over = row.status in {Status.STOPPING, Status.STOPPED} or (row.status == Status.ERROR and row.started_at is None)
    return not over


def settled(entry: OutboxEntry, row: SandboxRow | None, host: UUID, *, rests: bool) -> bool:
    """Whether what `host`'s outbox tells of this row is safe in it, or of no use to it; `row` as it is by now, `rests`
    as the listing that came with the entry says."""
    if row is None or row.host_id != host:
        return True
    if entry.event in ENDING:
        return rests or row.status not in ENDED_BY_ENTRY
    return entry.event != "auto_paused" or not rests or row.status not in PAUSED_BY_ENTRY


def _step(row: SandboxRow, facts: Facts, now: datetime) -> Step | None:
    overdue = row.transition_deadline is not None and row.transition_deadline < now
    if row.status in ENDED_BY_ENTRY and facts.ended is not None and not facts.rests:
        # Whether or not the listing still shows it: what is left is being removed, and the entry comes only once.
        return Change(row, Status.ERROR, reason=storable_text(facts.ended.reason) or "its VM ended")
    match row.status:
        case Status.STOPPING:
            return _stopping(row, facts, overdue=overdue)
        case Status.STARTING:
            return _starting(row, facts, overdue=overdue)
        case Status.PAUSING | Status.RESUMING if not overdue:
            return None  # somebody is at work
        case status if facts.absent and status in ENDED_BY_ENTRY:
            return _absent(row, facts, now)
        case Status.PAUSING | Status.RESUMING | Status.MISSING | Status.RUNNING if facts.rests:
            return _at_rest(row, facts)
        case Status.PAUSED if facts.runs:
            return _running(row, facts, via=Status.RESUMING)
        case Status.RUNNING if facts.runs:
            return _readdress(row, facts)
        case Status.PAUSING | Status.RESUMING | Status.MISSING if facts.runs:
            return _running(row, facts)
        case _:
            return None


def _stopping(row: SandboxRow, facts: Facts, *, overdue: bool) -> Step | None:
    if facts.absent:
        return Change(row, Status.STOPPED)
    ending = facts.vm is not None and facts.vm.status == Status.STOPPING
    return DestroyAgain(row) if overdue and not ending else None


def _starting(row: SandboxRow, facts: Facts, *, overdue: bool) -> Step | None:
    if facts.runs or facts.rests:  # one that rests has run; the next look brings it further
        return _running(row, facts)
    return Change(row, Status.ERROR, reason="it was not started in time") if overdue and facts.absent else None


def _absent(row: SandboxRow, facts: Facts, now: datetime) -> Step | None:
    """What ran is lost. What rests, or may rest, is `missing` until it is listed again: only a long time is an end."""
    match row.status:
        case Status.RUNNING | Status.MISSING if facts.paused is not None and not _rested(row):
            return _at_rest(row, facts)  # so it was told; the next look sees that it is not there
        case Status.PAUSED | Status.RESUMING | Status.PAUSING:
            via = Status.PAUSED if row.status == Status.PAUSING else None  # without its address, as all that rest
            return Change(row, Status.MISSING, reason="its host does not find its snapshot", via=via)
        case Status.MISSING if _rested(row) and now - row.last_updated < REST_LOST_AFTER:
            return None
        case _:
            return Change(row, Status.ERROR, reason="its host no longer has it")


def _rested(row: SandboxRow) -> bool:
    """Whether a row that is `missing` was at rest, as far as it can be told: what ran has an address."""
    return row.status == Status.MISSING and row.host_ip is None


def _running(row: SandboxRow, facts: Facts, *, via: Status | None = None) -> Change:
    host_ip = None if facts.vm is None else storable_address(facts.vm.host_ip)
    reason = "it could not be paused in time" if row.status == Status.PAUSING else None
    return Change(row, Status.RUNNING, host_ip=host_ip, reason=reason, via=via)


def _readdress(row: SandboxRow, facts: Facts) -> Step | None:
    host_ip = None if facts.vm is None else storable_address(facts.vm.host_ip)
    known = None if row.host_ip is None else str(row.host_ip)
    return None if host_ip in {None, known} else Readdress(row, host_ip)


def _at_rest(row: SandboxRow, facts: Facts) -> Change:
    if row.status == Status.RESUMING:
        return Change(row, Status.PAUSED, reason="it was not resumed in time")
    told = storable_text(facts.paused.reason) if facts.paused is not None else ""
    via = Status.PAUSING if row.status == Status.RUNNING else None
    untold = "its host has its snapshot again" if _rested(row) else "its host paused it"
    if row.status == Status.PAUSING:
        untold = "requested; its control plane went away"
    return Change(row, Status.PAUSED, reason=told or untold, via=via)
