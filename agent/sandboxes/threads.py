"""Long blocking work that a cancelled task must not leave behind, and cannot interrupt: it is asked to stop."""

from __future__ import annotations

import threading
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractContextManager

T = TypeVar("T")


async def run_stoppable(work: Callable[[Callable[[], bool]], T], *, stopped: type[Exception]) -> T:
    """`work(should_stop)` in a thread. Cancelled: `should_stop` answers True, and we wait until the work has ended.

    `stopped`: what the work raises then, if it does not come to its end.
    """
    stop = threading.Event()
    failure: Exception | None = None
    results: list[T] = []

    async def wait_for_cancellation() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stop.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_cancellation)
        try:
            results.append(await trio.to_thread.run_sync(work, stop.is_set))
        except stopped as err:
            await trio.lowlevel.checkpoint_if_cancelled()
            failure = err
        except Exception as err:  # noqa: BLE001 - raised below, outside of the nursery's group
            failure = err
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return results[0]


@asynccontextmanager
async def in_thread(make: Callable[[], AbstractContextManager[T]]) -> AsyncIterator[T]:
    """A context manager whose making, beginning and end block; it ends as after a success, whatever is raised."""
    with ExitStack() as stack:
        entered = await trio.to_thread.run_sync(lambda: stack.enter_context(make()))
        try:
            yield entered
        finally:
            with trio.CancelScope(shield=True):  # closes and removes files, and is done
                await trio.to_thread.run_sync(stack.close)
