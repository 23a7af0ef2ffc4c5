"""Work that must not end with the request that asked for it.

Owns: one task per operation (create, destroy, pause, …). Owned by: the control plane's nursery.
Takes: `finish(work)`: starts it here and waits for its outcome; the waiter may go away, the work goes on. Whoever asks
for the same (`key`) meanwhile gets the same outcome.
Dies when: the control plane stops; `drain` lets what is under way finish first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import structlog
import trio

from agent.actor.mailbox import ReplySlot
from capsule.errors import Busy, CapsuleError, Internal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

T = TypeVar("T")
log = structlog.get_logger()

MAX_OPERATIONS = 512
"""Operations at once; each holds a few KiB and waits most of its time."""


class Operations:
    """See the module's docstring."""

    def __init__(self, limit: int = MAX_OPERATIONS) -> None:
        self._limit = limit
        self._running = 0
        self._draining = False
        self._nursery: trio.Nursery | None = None
        self._idle = trio.Event()
        self._shared: dict[Hashable, ReplySlot[Any]] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the operations; until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def finish(self, work: Callable[[], Awaitable[T]], key: Hashable = None) -> T:
        """Run `work` here and return what it returns. Cancelling the caller does not cancel the work. When work of this
        `key` is under way, wait for that instead."""
        if key is not None and (shared := self._shared.get(key)) is not None:
            return cast("T", await shared.wait())
        if self._nursery is None or self._draining:
            raise Busy("the control plane is shutting down; try again", retry_after=5)
        if self._running >= self._limit:
            raise Busy(f"{self._limit} operations are under way; try again", retry_after=2)
        slot: ReplySlot[T] = ReplySlot()
        self._running += 1
        if key is not None:
            self._shared[key] = slot
        self._nursery.start_soon(self._work, work, slot, key)
        return await slot.wait()

    async def drain(self) -> None:
        """Start nothing new; return when everything under way has ended."""
        self._draining = True
        while self._running:
            self._idle = trio.Event()
            await self._idle.wait()

    def running(self) -> int:
        """Operations under way."""
        return self._running

    async def _work(self, work: Callable[[], Awaitable[T]], slot: ReplySlot[T], key: Hashable) -> None:
        try:
            slot.answer(await work())
        except CapsuleError as err:
            slot.fail(err)
        except Exception:
            log.exception("operation_failed")
            slot.fail(Internal("internal error; the server's log has the details"))
        finally:
            slot.fail(Busy("the control plane was stopped before this was finished; ask again", retry_after=5))
            self._shared.pop(key, None)
            self._running -= 1
            self._idle.set()
