"""Throw-away threads, the only place where a namespace may be entered.

`setns` and `unshare` change the calling thread for good. Trio's worker threads are used again, so a job that entered
a namespace there would drag the next, unrelated job into it. A SlotThread runs one job and ends.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import trio

from agent.net.errors import SlotTimeoutError, WrongThreadError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

SLOT_JOB_SECONDS = 30.0
"""A slot takes tens of milliseconds; a job that overruns this sits behind a lock in the kernel."""


class SlotThread(threading.Thread, Generic[T]):
    """Runs `job` once. A daemon thread: a job stuck in the kernel must not keep the process from ending.

    The caller's context variables are not copied: they would tell pyroute2 (asyncio inside) that it runs under Trio.
    """

    def __init__(
        self, job: Callable[[], T], *, finished: Callable[[], None], discard: Callable[[T], None] | None
    ) -> None:
        super().__init__(name="slot", daemon=True)
        self._job = job
        self._finished = finished
        self._discard = discard
        self._lock = threading.Lock()
        self._abandoned = False
        self._done = False
        self._value: T | None = None
        self._error: Exception | None = RuntimeError("the job left its thread without a result")

    def run(self) -> None:
        try:
            self._value = self._job()
            self._error = None
        except Exception as err:  # noqa: BLE001 - carried to the caller, who raises it
            self._error = err
        finally:
            self._report()

    def _report(self) -> None:
        with self._lock:
            self._done = True
            late = self._abandoned
        if not late:
            self._finished()
        elif self._error is None and self._discard is not None:
            self._discard(cast("T", self._value))

    def abandon(self) -> bool:
        """Tell the thread that nobody waits any more; False if it had already finished."""
        with self._lock:
            self._abandoned = not self._done
            return self._abandoned

    def result(self) -> T:
        """What the job returned, or raise what it raised; only after it has finished."""
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


async def run_in_slot_thread(
    job: Callable[[], T], *, seconds: float = SLOT_JOB_SECONDS, discard: Callable[[T], None] | None = None
) -> T:
    """Run `job()` in a fresh SlotThread and return its result or raise its error.

    Waiting cannot be cancelled, for the work cannot be either: a half-done slot must not be left behind. After
    `seconds` it is SlotTimeoutError (its `thread` is still running); a result that comes later is given to `discard`.
    """
    token = trio.lowlevel.current_trio_token()
    finished = trio.Event()

    def notify() -> None:
        try:
            token.run_sync_soon(finished.set)
        except trio.RunFinishedError:
            return

    thread = SlotThread(job, finished=notify, discard=discard)
    thread.start()
    with trio.move_on_after(seconds, shield=True):
        await finished.wait()
    if not finished.is_set() and thread.abandon():
        raise SlotTimeoutError(f"a slot job is still running after {seconds:g} s", thread)
    return thread.result()


def call_in_slot_thread(job: Callable[[], T]) -> T:
    """Run `job()` in a fresh SlotThread from code without Trio; blocks until it has ended."""
    thread = SlotThread(job, finished=lambda: None, discard=None)
    thread.start()
    thread.join()
    return thread.result()


def require_slot_thread() -> None:
    """Raise WrongThreadError unless the calling thread is a SlotThread."""
    if not isinstance(threading.current_thread(), SlotThread):
        raise WrongThreadError("namespaces are entered in a SlotThread only: use run_in_slot_thread")
