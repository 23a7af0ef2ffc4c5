"""FakeSlotBackend: slots that are entries of a set. Passes the same conformance suite as the real backend."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

import trio

from agent.net.addresses import slot_addresses
from agent.net.errors import NetworkError, SlotCreateError, TapError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class FakeSlotBackend:
    """In memory, for tests and for hosts that only pretend. Jobs take `seconds` of the Trio clock.

    `create_errors`, `remove_errors` and `existing_errors` are raised and used up one per call, oldest first;
    `log` holds ("create" or "remove", number) for every job that succeeded, in the order in which they ended.
    """

    def __init__(self, existing: Iterable[int] = (), *, seconds: float = 0) -> None:
        self.seconds = seconds
        self.create_errors: list[NetworkError] = []
        self.remove_errors: list[NetworkError] = []
        self.existing_errors: list[NetworkError] = []
        self.log: list[tuple[str, int]] = []
        self.at_work: set[int] = set()
        self.most_at_work = 0
        self._slots = set(existing)
        self._taps: dict[int, int] = {}

    async def create(self, number: int) -> None:
        slot_addresses(number)
        await self._work(number, self.create_errors)
        if number in self._slots:
            raise SlotCreateError(f"slot {number} exists already")
        self._slots.add(number)
        self.log.append(("create", number))

    async def remove(self, number: int) -> None:
        slot_addresses(number)
        await self._work(number, self.remove_errors)
        self._slots.discard(number)
        self._close_tap(number)
        self.log.append(("remove", number))

    async def existing(self) -> set[int]:
        await trio.lowlevel.checkpoint()
        if self.existing_errors:
            raise self.existing_errors.pop(0)
        return set(self._slots)

    async def is_clean(self, number: int) -> bool:
        slot_addresses(number)
        await trio.lowlevel.checkpoint()
        return number in self._slots

    def namespace(self, number: int) -> Path | None:  # noqa: ARG002
        """None: there is nothing to enter."""
        return None

    async def open_tap(self, number: int) -> int:
        """The reading end of a pipe; the backend keeps the other one, by which it sees when this one is closed."""
        await trio.lowlevel.checkpoint()
        if number not in self._slots:
            raise TapError(f"there is no slot {number}")
        if number in self._taps and not _reader_is_gone(self._taps[number]):
            raise TapError(f"the tap of slot {number} is open")
        self._close_tap(number)
        mine, self._taps[number] = os.pipe()
        return mine

    def _close_tap(self, number: int) -> None:
        if number in self._taps:
            os.close(self._taps.pop(number))

    async def _work(self, number: int, errors: list[NetworkError]) -> None:
        if number in self.at_work:
            raise AssertionError(f"two jobs at a time on slot {number}")
        self.at_work.add(number)
        self.most_at_work = max(self.most_at_work, len(self.at_work))
        try:
            with trio.CancelScope(shield=True):  # as a thread: it goes on, whoever has stopped waiting
                await trio.sleep(self.seconds)
        finally:
            self.at_work.discard(number)
        if errors:
            raise errors.pop(0)


def _reader_is_gone(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))
