"""What to do about one host: a pure function of its rows, read first, and its listing, asked for afterwards.

Every step is a compare-and-set on the row as it was read, so a row that somebody changed meanwhile is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
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
    """Bring a row to `to_status`."""

    row: SandboxRow
    to_status: Status
    host_ip: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class DestroyAgain:
    """Somebody gave up half-way: tell the host once more to end this sandbox."""

    row: SandboxRow


Step = Change | DestroyAgain

ENDED_BY_ENTRY = frozenset({Status.STARTING, Status.RUNNING, Status.MISSING})
"""Whatever of these the host says it lost, is lost."""


def plan(rows: Iterable[SandboxRow], listing: HostListing, now: datetime) -> list[Step]:
    """Steps for the rows of one host (those that live or rest there)."""
    alive = {UUID(state.sandbox_id): state for state in listing.sandboxes}
    told = {UUID(entry.sandbox_id): entry for entry in listing.outbox}
    steps = (_step(row, alive.get(row.id), told.get(row.id), now) for row in rows)
    return [step for step in steps if step is not None]


def strangers(rows: Iterable[SandboxRow], listing: HostListing) -> set[UUID]:
    """VMs on the host that none of its rows speaks of."""
    return {UUID(state.sandbox_id) for state in listing.sandboxes} - {row.id for row in rows}


def settled(row: SandboxRow | None, host: UUID) -> bool:
    """Whether what `host`'s outbox tells of this row is safe in it, or of no use to it; `row` as it is by now."""
    return row is None or row.host_id != host or row.status not in ENDED_BY_ENTRY


def _step(row: SandboxRow, vm: SandboxState | None, entry: OutboxEntry | None, now: datetime) -> Step | None:
    overdue = row.transition_deadline is not None and row.transition_deadline < now
    match row.status:
        case Status.STOPPING if vm is None:
            return Change(row, Status.STOPPED)
        case Status.STOPPING if overdue and vm is not None and vm.status != Status.STOPPING:
            return DestroyAgain(row)
        case status if status in ENDED_BY_ENTRY and entry is not None:
            # Whether or not the listing still shows it: what is left is being removed, and the entry comes only once.
            return Change(row, Status.ERROR, reason=storable_text(entry.reason) or "its VM ended")
        case Status.STARTING | Status.MISSING if vm is not None and vm.status == Status.RUNNING:
            return Change(row, Status.RUNNING, host_ip=storable_address(vm.host_ip))
        case Status.STARTING if vm is None and overdue:
            return Change(row, Status.ERROR, reason="it was not started in time")
        case Status.RUNNING | Status.MISSING if vm is None:
            return Change(row, Status.ERROR, reason="its host no longer has it")
        case _:
            return None
