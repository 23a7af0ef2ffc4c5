"""Two peers joined by memory, and a fixture that fails every test during which a task held the event loop."""

from __future__ import annotations

import gc
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from agent.actor.peer import OpenerPeer
from agent.actor.server import Handler, ServerPeer
from agent.actor.watchdog import LoopWatchdog

HELD = 0.25
"""Well above the daemons' limit: a virtual CPU that was taken away counts as time spent computing."""

BOUND, BOUND_VIRTUAL = 30.0, 100_000.0
"""Seconds a test may take, on the real and on a fake clock."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "may_hold_loop: this test's tasks may hold the event loop")


@pytest.fixture(autouse=True)
def watch_loop(request: pytest.FixtureRequest) -> None:
    """Run an async test under LoopWatchdog and fail it when a step held the loop; `may_hold_loop` opts out.

    pytest-trio has no async autouse fixtures; what runs the test is the `run` of its marker, so it is set here.
    """
    test = getattr(request.node.obj, "hypothesis", None)
    function = test.inner_test if test is not None else request.node.obj
    if not inspect.iscoroutinefunction(function) or request.node.get_closest_marker("may_hold_loop"):
        return
    request.node.add_marker(pytest.mark.trio(run=run_watched), append=False)


def run_watched(main: Callable[..., Any], *, instruments: list[trio.abc.Instrument], **options: Any) -> Any:
    """`trio.run` with a bound on the whole test, which reports steps over the limit as a failure."""

    async def bounded() -> Any:
        with trio.fail_after(BOUND if options.get("clock") is None else BOUND_VIRTUAL):
            return await main()

    held: list[str] = []
    watchdog = LoopWatchdog(lambda task, seconds: held.append(f"{task} ({seconds * 1000:.0f} ms)"), limit=HELD)
    gc.freeze()  # a full collection of what earlier tests left behind would be a long step, too
    try:
        result = trio.run(bounded, instruments=[*instruments, watchdog], **options)
    finally:
        gc.unfreeze()
    assert not held, f"tasks held the event loop: {', '.join(held)}"
    return result


@pytest.fixture
def joined() -> Callable[..., Any]:
    """`async with joined(handler) as (opener, server)`: both running, over streams without buffers of their own.

    At the end both are closed, and no stream may be left open on either.
    """

    @asynccontextmanager
    async def join(
        handler: Handler,
        streams: tuple[trio.abc.Stream, trio.abc.Stream] | None = None,
        **options: int,
    ) -> AsyncIterator[tuple[OpenerPeer, ServerPeer]]:
        near, far = streams or trio.testing.lockstep_stream_pair()
        opener, server = OpenerPeer(near), ServerPeer(far, handler, **options)
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                starting.start_soon(partial(nursery.start, opener.run))
                starting.start_soon(partial(nursery.start, server.run))
            yield opener, server
            await trio.testing.wait_all_tasks_blocked()
            assert opener.closed.is_set() or opener.link.open_streams() == len(opener._streams) == 0
            assert server.closed.is_set() or server.link.open_streams() == len(server._streams) == 0
            opener.close()
            server.close()

    return join
