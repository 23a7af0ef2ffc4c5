"""What the pool builds slots with: the Protocol, and the one for real namespaces; `fake.py` needs no privileges."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from agent.net import slots
from agent.net.addresses import slot_addresses
from agent.net.errors import SlotBusyError, SlotTimeoutError
from agent.net.namespace import NAMESPACE_DIR
from agent.net.tap import add_persistent_tap
from agent.net.threads import SLOT_JOB_SECONDS, run_in_slot_thread

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")


class SlotBackend(Protocol):
    """Makes and removes slots. Failures are NetworkErrors; no method can be cancelled half-way.

    Different numbers may be worked on at the same time; the pool never works on one number twice at a time.
    """

    async def create(self, number: int) -> None:
        """Build a slot; an error if it exists, and after an error nothing that this call made is left."""

    async def remove(self, number: int) -> None:
        """Remove a slot, whole, half-made or absent, with all that anyone remembers of its tenant."""

    async def existing(self) -> set[int]:
        """Numbers of all slots of this host of which anything exists."""

    async def is_clean(self, number: int) -> bool:
        """Whether the slot is whole and has seen no traffic."""

    def namespace(self, number: int) -> Path | None:
        """Where the slot's namespace can be entered; None when it has none."""

    async def open_tap(self, number: int) -> int:
        """A new descriptor of the slot's tap, owned by the caller; TapError if there is none or it is open already."""


class NamespaceSlotBackend:
    """Slots of this machine, each job in a thread of its own. Needs root; one per process.

    A job that overran its time still runs: until it has ended, every other job on that number is SlotBusyError.
    Otherwise a late removal could take the slot from under its next tenant.
    """

    def __init__(self, *, seconds: float = SLOT_JOB_SECONDS, add_tap: Callable[[], None] = add_persistent_tap) -> None:
        self._seconds = seconds
        self._add_tap = add_tap
        self._overrun: dict[int, threading.Thread] = {}

    async def create(self, number: int) -> None:
        await self._run(number, partial(slots.create_slot, number, add_tap=self._add_tap))

    async def remove(self, number: int) -> None:
        await self._run(number, partial(slots.remove_slot, number))

    async def existing(self) -> set[int]:
        return await run_in_slot_thread(slots.existing_slots, seconds=self._seconds)

    async def is_clean(self, number: int) -> bool:
        return await self._run(number, partial(slots.slot_is_clean, number))

    def namespace(self, number: int) -> Path | None:
        return NAMESPACE_DIR / slot_addresses(number).namespace

    async def open_tap(self, number: int) -> int:
        return await self._run(number, partial(slots.open_tap, number), discard=os.close)

    async def _run(self, number: int, job: Callable[[], T], *, discard: Callable[[T], None] | None = None) -> T:
        overrun = self._overrun.get(number)
        if overrun is not None and overrun.is_alive():
            raise SlotBusyError(f"an earlier job on slot {number} has not ended yet")
        self._overrun.pop(number, None)
        try:
            return await run_in_slot_thread(job, seconds=self._seconds, discard=discard)
        except SlotTimeoutError as err:
            self._overrun[number] = err.thread
            raise
