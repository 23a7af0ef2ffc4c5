"""The way from Trio to an asyncio event loop on a thread of its own, and back.

Why a thread: the driver speaks asyncio only, and this costs a seventh of running asyncio inside Trio
(docs/decisions/0002). Crossings are batched: what piles up while the other side is busy crosses with one wake-up.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import structlog
import trio
import uvloop

from capsule.db.errors import DatabaseUnavailable

log = structlog.get_logger()

T = TypeVar("T")

CANCEL_GRACE = 3.0
"""Seconds a cancelled call may take to clean up before its Trio task goes on without it. Longer than the pool's own
bound on giving a connection back, so it is reached only if the thread itself hangs."""

STOP_GRACE = 5.0
"""Seconds the thread may take to end; after that it is left behind (it is a daemon thread and holds no state)."""


class _Call(Generic[T]):
    """One coroutine on its way: made by a Trio task, run on the loop, answered through the bridge."""

    __slots__ = ("abandoned", "answered", "error", "task", "value", "work")

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self.work = work
        self.answered = trio.Event()
        self.abandoned = False
        self.task: asyncio.Task[T] | None = None
        self.value: T | None = None
        self.error: BaseException | None = None

    def result(self) -> T:
        if not self.answered.is_set():
            raise DatabaseUnavailable("the database thread does not answer; try again")
        if isinstance(self.error, asyncio.CancelledError):
            raise DatabaseUnavailable("the database is being closed") from self.error
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # set whenever error is not


class Bridge:
    """Runs coroutines on the loop thread for Trio tasks.

    Owns: the thread, its loop, the two queues of crossings. Owned by: the `open_bridge` block. Takes: `call` and `post`
    from Trio, `tell` from the loop. Dies when the block ends: the loop's tasks are cancelled, the thread is waited for
    at most STOP_GRACE.
    """

    def __init__(self) -> None:
        self._trio = trio.lowlevel.current_trio_token()
        self._loop = uvloop.new_event_loop()
        self._to_loop: deque[Callable[[], object]] = deque()
        self._to_trio: deque[Callable[[], object]] = deque()
        self._loop_woken = False
        self._trio_woken = False
        self._stop: asyncio.Event | None = None
        self._ended = trio.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="capsule-database", daemon=True)

    async def call(self, work: Callable[[], Coroutine[Any, Any, T]], *, limit: float) -> T:
        """Run `work()` on the loop and return or raise what it does.

        Cancelling the Trio task cancels the coroutine and waits up to CANCEL_GRACE for its clean-up. `limit` (seconds)
        is the last resort; the coroutine is expected to have a time-out of its own.
        """
        call = _Call(work)
        self.post(lambda: self._start(call))
        try:
            with trio.move_on_after(limit):
                await call.answered.wait()
        finally:
            if not call.answered.is_set():
                call.abandoned = True
                self._post_quietly(lambda: self._cancel(call))
                with trio.move_on_after(CANCEL_GRACE, shield=True):
                    await call.answered.wait()
        return call.result()

    def post(self, action: Callable[[], object]) -> None:
        """Trio side: have the loop run `action` soon. Raises DatabaseUnavailable once the bridge is closed."""
        if self._closed:
            raise DatabaseUnavailable("the database is closed")
        self._to_loop.append(action)
        # Append first, look second; the loop clears the flag first and empties second: nothing is left behind.
        if not self._loop_woken:
            self._loop_woken = True
            self._loop.call_soon_threadsafe(self._drain_to_loop)

    def tell(self, action: Callable[[], object]) -> None:
        """Loop side: have Trio run `action` soon, together with all others of this turn of the loop."""
        self._to_trio.append(action)
        if not self._trio_woken:
            self._trio_woken = True
            self._loop.call_soon(self._wake_trio)

    def _post_quietly(self, action: Callable[[], object]) -> None:
        if not self._closed:
            self.post(action)

    def _drain_to_loop(self) -> None:
        self._loop_woken = False
        while self._to_loop:
            self._to_loop.popleft()()

    def _wake_trio(self) -> None:
        self._trio_woken = False
        try:
            self._trio.run_sync_soon(self._drain_to_trio)
        except trio.RunFinishedError:
            self._to_trio.clear()  # nobody is left to be told

    def _drain_to_trio(self) -> None:
        while self._to_trio:
            self._to_trio.popleft()()

    def _start(self, call: _Call[T]) -> None:
        if call.abandoned:
            self.tell(call.answered.set)
            return
        call.task = self._loop.create_task(call.work())
        call.task.add_done_callback(lambda task: self._answer(call, task))

    def _cancel(self, call: _Call[Any]) -> None:
        if call.task is not None:
            call.task.cancel()

    def _answer(self, call: _Call[T], task: asyncio.Task[T]) -> None:
        if task.cancelled():
            call.error = asyncio.CancelledError()
        elif (error := task.exception()) is not None:
            call.error = error
        else:
            call.value = task.result()
        self.tell(call.answered.set)

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Cancel what still runs and wait for the thread to end."""
        self._closed = True
        self._loop.call_soon_threadsafe(self._ask_to_stop)
        await self._ended.wait()

    def _ask_to_stop(self) -> None:
        if self._stop is not None:
            self._stop.set()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        finally:
            try:
                self._trio.run_sync_soon(self._drain_to_trio)  # answers to the tasks the runner cancelled at its end
                self._trio.run_sync_soon(self._ended.set)
            except trio.RunFinishedError:
                pass

    async def _serve(self) -> None:
        self._loop.set_exception_handler(_report)
        self._stop = asyncio.Event()
        await self._stop.wait()


def _report(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An error in a callback of the driver: it concerns one connection, never the program."""
    error = context.get("exception")
    if error is None:  # a remark, such as that a cancelled BEGIN was rolled back
        log.debug("database_loop_remark", detail=context.get("message", ""))
    else:
        log.warning("database_loop_error", detail=context.get("message", ""), error=repr(error))


@asynccontextmanager
async def open_bridge() -> AsyncIterator[Bridge]:
    """A running bridge for the length of the block."""
    bridge = Bridge()
    bridge.start()
    try:
        yield bridge
    finally:
        with trio.move_on_after(STOP_GRACE, shield=True):
            await bridge.stop()
