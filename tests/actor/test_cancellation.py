"""A caller that is cancelled at any point whatever leaves the connection healthy."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from agent.wire import limits
from agent.wire.faults import Fault

CHUNK = b"x" * 30_000


class CancelAfter(trio.abc.Instrument):
    """Cancels `scope` after the n-th step of `task`, which then is at a checkpoint."""

    def __init__(self, task: trio.lowlevel.Task, steps: int, scope: trio.CancelScope) -> None:
        self._task, self._left, self._scope = task, steps, scope

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


async def handler(method, body, stream):
    """Several waits of each kind, so that a caller has many points to be cancelled at."""
    total = 0
    async for _, data in stream:
        total += len(data)
        await stream.send(data)
    await trio.lowlevel.checkpoint()
    return {"total": total}


async def call(opener):
    assert await opener.call("m", {}, timeout=60) == {"total": 0}


async def converse(opener):
    """More than the credit both ways, then the answer."""
    async with opener.open_stream("m", {}, timeout=60) as stream, trio.open_nursery() as nursery:

        async def pour() -> None:
            for _ in range(12):
                await stream.send(CHUNK)
            await stream.end()

        nursery.start_soon(pour)
        total = 0
        async for _, data in stream:
            total += len(data)
        assert (await stream.reply())["total"] == total == 12 * len(CHUNK)


async def send_alone(opener):
    """The sender runs out of credit, for nobody reads the echo; it ends with the deadline."""
    with pytest.raises(Fault, match="did not finish in time"):  # noqa: PT012 - the block itself may raise it
        async with opener.open_stream("m", {}, timeout=60) as stream:
            await stream.send(CHUNK * 40)
            await stream.reply()


async def cancelled_after(steps, work):
    """Whether `work` was still going after that many steps of its task."""
    with trio.CancelScope() as scope:
        instrument = CancelAfter(trio.lowlevel.current_task(), steps, scope)
        trio.lowlevel.add_instrument(instrument)
        try:
            await work()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return scope.cancelled_caught


@pytest.mark.parametrize("work", [call, converse, send_alone])
async def test_cancelled_at_every_point(joined, autojump_clock, work):
    """After 1, 2, 3 … steps until it gets through: each time the slots are free and the next call is answered."""
    assert 12 * len(CHUNK) > limits.INITIAL_CREDIT
    async with joined(handler) as (opener, server):
        steps = 1
        while await cancelled_after(steps, lambda: work(opener)):
            await wait_all_tasks_blocked()
            assert opener.link.open_streams() == server.link.open_streams() == 0
            await call(opener)
            steps += 1
        assert steps > (1 if work is call else 3)


@pytest.mark.parametrize("steps", range(1, 12))
async def test_a_server_cancelled_at_any_point_ends_cleanly(joined, steps):
    """The far side is cut off in the middle: no exception but the Fault, nobody hangs."""
    async with joined(handler) as (opener, server):
        near_end = trio.Event()
        failures = []

        async def work() -> None:
            try:
                await converse(opener)
            except* Fault as lost:  # from either task of the conversation, and nothing else
                failures.append(lost)
            near_end.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            server.close()
            with trio.fail_after(5):
                await near_end.wait()
    assert "connection was lost" in repr(failures[0].exceptions)
