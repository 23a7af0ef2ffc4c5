"""The pool's books: which slot number is in which state, and what is due when. Pure; time is an argument, in seconds.

    free -> preparing -> ready -> in use -> removing -> free (at the end of the queue: oldest first)
    preparing -> removing, when building fails;  removing -> removing, when removing fails

A number is in exactly one state, and only `removed` makes one free again.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.net.addresses import SlotAddresses, slot_addresses

if TYPE_CHECKING:
    from collections.abc import Iterable

WORKERS = 4
"""Slots being built or removed at a time. More gains little: the kernel does most of it under one lock."""
FIRST_BACKOFF_SECONDS = 0.1
LAST_BACKOFF_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Slot:
    """One tenancy of a slot. The lease tells this tenant from the slot's earlier and later ones."""

    addresses: SlotAddresses
    lease: int

    @property
    def number(self) -> int:
        return self.addresses.number


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatistics:
    """How many slots are in which state, how many acquirers wait, and failures since the start."""

    free: int
    preparing: int
    ready: int
    in_use: int
    removing: int
    waiting: int
    failed_preparations: int
    failed_removals: int


class SlotLedger:
    """State of the slots in `numbers`, and of any other that had to be adopted or is being removed."""

    def __init__(self, numbers: range, *, ahead: int) -> None:
        self.numbers = numbers
        self._ahead = ahead
        self._free = deque(numbers)
        self._preparing: set[int] = set()
        self._ready: deque[int] = deque()
        self._in_use: dict[int, Slot] = {}
        self._removals: deque[tuple[float, int]] = deque()  # (not before, number)
        self._removing: set[int] = set()
        self._leases = 0
        self._prepare_not_before = -math.inf
        self._prepare_failures_in_a_row = 0
        self._removal_failures_in_a_row: dict[int, int] = {}
        self._failed_preparations = 0
        self._failed_removals = 0

    def adopt(self, numbers: Iterable[int]) -> dict[int, Slot]:
        """Free numbers, or numbers outside the range, become in use. ValueError for one that is in use already."""
        adopted: dict[int, Slot] = {}
        for number in numbers:
            if number in self._in_use:
                raise ValueError(f"slot {number} has been adopted already")
            adopted[number] = self._lease(number)
        self._free = deque(number for number in self._free if number not in self._in_use)
        return adopted

    def collect(self, existing: set[int]) -> tuple[list[int], list[int]]:
        """Queue what exists and is not in use for removal; returns those, and those in use that do not exist."""
        left = sorted(existing - self._in_use.keys())
        self._free = deque(number for number in self._free if number not in existing)
        self._removals.extend((-math.inf, number) for number in left)
        return left, sorted(self._in_use.keys() - existing)

    def take_ready(self) -> Slot | None:
        """The slot that has been ready longest becomes in use; None if none is ready."""
        return self._lease(self._ready.popleft()) if self._ready else None

    def coming(self) -> int:
        """How many slots can still become ready without another release."""
        removing = [number for _time, number in self._removals] + list(self._removing)
        return len(self._free) + len(self._preparing) + sum(number in self.numbers for number in removing)

    def release(self, slot: Slot | int) -> bool:
        """In use to removing; False if that tenancy (or, for a number, any) is not there."""
        number = slot if isinstance(slot, int) else slot.number
        holder = self._in_use.get(number)
        if holder is None or (isinstance(slot, Slot) and slot.lease != holder.lease):
            return False
        del self._in_use[number]
        self._removals.append((-math.inf, number))
        return True

    def next_preparation(self, now: float, *, waiting: int) -> int | None:
        """A free number becomes preparing if another slot is wanted; after a failure one is tried at a time."""
        wanted = self._ahead + waiting - len(self._ready) - len(self._preparing)
        probing = self._prepare_failures_in_a_row > 0 and self._preparing
        if wanted <= 0 or probing or now < self._prepare_not_before or not self._free or self._busy():
            return None
        number = self._free.popleft()
        self._preparing.add(number)
        return number

    def prepared(self, number: int) -> None:
        self._preparing.remove(number)
        self._ready.append(number)
        self._prepare_failures_in_a_row = 0

    def preparation_failed(self, number: int, now: float) -> float:
        """Preparing to removing, which finds what a failed undoing left; returns the seconds until the next try."""
        self._preparing.remove(number)
        self._removals.append((-math.inf, number))
        self._failed_preparations += 1
        self._prepare_failures_in_a_row += 1
        delay = _backoff(self._prepare_failures_in_a_row)
        self._prepare_not_before = now + delay
        return delay

    def next_removal(self, now: float) -> int | None:
        """The first number whose removal is due, if a worker is free."""
        if self._busy():
            return None
        for entry in self._removals:
            not_before, number = entry
            if not_before <= now:
                self._removals.remove(entry)
                self._removing.add(number)
                return number
        return None

    def removed(self, number: int) -> None:
        self._removing.remove(number)
        self._removal_failures_in_a_row.pop(number, None)
        if number in self.numbers:
            self._free.append(number)

    def removal_failed(self, number: int, now: float) -> float:
        """Still removing; returns the seconds until the next try."""
        self._removing.remove(number)
        failures = self._removal_failures_in_a_row.get(number, 0) + 1
        self._removal_failures_in_a_row[number] = failures
        self._failed_removals += 1
        delay = _backoff(failures)
        self._removals.append((now + delay, number))
        return delay

    def next_due(self, now: float) -> float:
        """When time alone makes a job due; infinity if only a change can."""
        times = [self._prepare_not_before, *(not_before for not_before, _number in self._removals)]
        return min((time for time in times if time > now), default=math.inf)

    def statistics(self, *, waiting: int) -> PoolStatistics:
        return PoolStatistics(
            free=len(self._free),
            preparing=len(self._preparing),
            ready=len(self._ready),
            in_use=len(self._in_use),
            removing=len(self._removals) + len(self._removing),
            waiting=waiting,
            failed_preparations=self._failed_preparations,
            failed_removals=self._failed_removals,
        )

    def _busy(self) -> bool:
        return len(self._preparing) + len(self._removing) >= WORKERS

    def _lease(self, number: int) -> Slot:
        self._leases += 1
        slot = self._in_use[number] = Slot(slot_addresses(number), self._leases)
        return slot


def _backoff(failures_in_a_row: int) -> float:
    return min(LAST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures_in_a_row - 1, 30))
