"""The slot pool: builds slots ahead of need, hands them out, takes them back, and hands out none that is not new.

Owns: the numbers of its range (`SlotLedger`), one task per slot being built or removed.
Owned by: the daemon's services nursery (`await nursery.start(pool.run)`), which ends it after the sandboxes.
Takes: `acquire()` (waits), `release(slot)` (does not wait), `adopt(numbers)` before it runs.
Emits: `statistics()`; a log event for every failure.
Dies when: it is cancelled, or the host's slots cannot be listed at the start. Waiters get PoolClosedError. Slots
stay as they are, since VMs outlive the daemon: the next pool adopts those in use and removes the others.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
import trio

from agent.net.addresses import slot_numbers
from agent.net.errors import NetworkError, NoFreeSlots, PoolClosedError
from agent.net.ledger import PoolStatistics, Slot, SlotLedger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.net.backend import SlotBackend

log = structlog.get_logger()

DEFAULT_COUNT = 1000
DEFAULT_AHEAD = 4


@dataclass(slots=True, eq=False)
class _Waiter:
    served: trio.Event = field(default_factory=trio.Event)
    slot: Slot | None = None


class SlotPool:
    """See the module. All methods belong to the Trio thread; none of them blocks it."""

    def __init__(
        self, backend: SlotBackend, *, first: int = 1, count: int = DEFAULT_COUNT, ahead: int = DEFAULT_AHEAD
    ) -> None:
        self._backend = backend
        self._ledger = SlotLedger(slot_numbers(first, count), ahead=ahead)
        self._waiters: deque[_Waiter] = deque()  # not empty only while no slot is ready
        self._changed = trio.Event()
        self._started = False
        self._closed = False

    def adopt(self, numbers: Iterable[int]) -> dict[int, Slot]:
        """Take slots as in use (by VMs that outlived the last daemon) and return their leases, to be released one day.

        Before `run` only; a number twice is ValueError. One outside the range is fine: it may have been changed.
        """
        if self._started:
            raise RuntimeError("slots are adopted before the pool runs")
        return self._ledger.adopt(numbers)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled. Started once the slots left by an earlier daemon are known; their removal goes on."""
        if self._started:
            raise RuntimeError("a pool runs once")
        self._started = True
        try:
            left, missing = self._ledger.collect(await self._backend.existing())
            if left:
                log.info("slots_left_behind", count=len(left))
            if missing:
                log.error("adopted_slots_missing", slots=missing)
            async with trio.open_nursery() as nursery:
                task_status.started()
                await self._dispatch(nursery)
        finally:
            self._closed = True
            for waiter in self._waiters:
                waiter.served.set()

    async def acquire(self) -> Slot:
        """A slot that nobody has used since it was built; waits while one is being made (give it a deadline).

        NoFreeSlots if all are in use, PoolClosedError if the pool has ended. The caller releases it exactly once.
        """
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise PoolClosedError("the slot pool has ended")
        if (slot := self._ledger.take_ready()) is not None:
            self._changed.set()
            return slot
        if self._ledger.coming() <= len(self._waiters):
            raise NoFreeSlots(
                f"all {len(self._ledger.numbers)} network slots of this host are in use: "
                "stop a sandbox, or configure more slots"
            )
        return await self._wait()

    def release(self, slot: Slot | int) -> bool:
        """Give a slot back, to be removed and built anew; False, and a log event, if this tenancy has ended already.

        Pass the Slot: a number stands for whoever has it now, so releasing a number twice can hit the next tenant.
        """
        released = self._ledger.release(slot)
        if released:
            self._changed.set()
        else:
            log.error("slot_release_refused", slot=slot if isinstance(slot, int) else slot.number)
        return released

    def statistics(self) -> PoolStatistics:
        """A snapshot, for metrics and for tests."""
        return self._ledger.statistics(waiting=len(self._waiters))

    async def _wait(self) -> Slot:
        waiter = _Waiter()
        self._waiters.append(waiter)
        self._changed.set()
        try:
            await waiter.served.wait()
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        if waiter.slot is None:
            raise PoolClosedError("the slot pool has ended")
        return waiter.slot

    async def _dispatch(self, nursery: trio.Nursery) -> None:
        """Start every job that is due, then sleep until something has changed or time makes another one due."""
        while True:
            self._changed = trio.Event()
            now = trio.current_time()
            while (number := self._ledger.next_preparation(now, waiting=len(self._waiters))) is not None:
                nursery.start_soon(self._prepare, number)
            while (number := self._ledger.next_removal(now)) is not None:
                nursery.start_soon(self._remove, number)
            with trio.move_on_at(self._ledger.next_due(now)):
                await self._changed.wait()

    async def _prepare(self, number: int) -> None:
        try:
            await self._backend.create(number)
        except NetworkError as err:
            delay = self._ledger.preparation_failed(number, trio.current_time())
            log.warning("slot_preparation_failed", slot=number, retry_seconds=delay, error=_reason(err))
        else:
            self._ledger.prepared(number)
            self._serve()
        self._changed.set()

    def _serve(self) -> None:
        """Hand what is ready to whoever has waited longest."""
        while self._waiters and (slot := self._ledger.take_ready()) is not None:
            waiter = self._waiters.popleft()
            waiter.slot = slot
            waiter.served.set()

    async def _remove(self, number: int) -> None:
        try:
            await self._backend.remove(number)
        except NetworkError as err:
            delay = self._ledger.removal_failed(number, trio.current_time())
            log.warning("slot_removal_failed", slot=number, retry_seconds=delay, error=_reason(err))
        else:
            self._ledger.removed(number)
        self._changed.set()


def _reason(err: BaseException) -> str:
    """The error and, if it is a group that caused it, every error of the group."""
    cause = err.__cause__
    return f"{err} ({'; '.join(map(str, cause.exceptions))})" if isinstance(cause, ExceptionGroup) else str(err)
