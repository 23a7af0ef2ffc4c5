"""With real threads, on a disk that takes its time: nothing of the agent holds the loop."""

from __future__ import annotations

import threading
import time

import pytest
import trio
from sandbox_world import create_body, sandbox_id

SLOW = 0.5
"""Seconds for each fsync, well above what a task may hold the loop for (`HELD` in conftest.py)."""

pytestmark = pytest.mark.real_threads


async def test_a_slow_disk(host):
    """Create, death, destroy, acknowledge, adoption: every write is a thread's, and no step takes long (see
    conftest.py)."""

    writers = []

    def slow(name):
        if name in {"fsync", "rmtree"}:
            writers.append(threading.current_thread())
            time.sleep(SLOW)

    host.on_step = slow
    one, two = sandbox_id(1), sandbox_id(2)
    with trio.fail_after(120):
        async with host.agent() as agent, agent.connection() as control_plane:
            async with trio.open_nursery() as creates:
                for name in (one, two):
                    creates.start_soon(agent.create, name)
            host.vms.machine(one).die("boom")
            await agent.manager.find(one).gone.wait()
            (entry,) = agent.outbox.entries()
            await control_plane.call("host.acknowledge", {"sequence": entry.sequence}, timeout=60)
        async with host.agent() as agent, agent.connection() as control_plane:
            await control_plane.call("sandbox.create", create_body(two), timeout=60)
            await control_plane.call("sandbox.destroy", {"sandbox_id": two}, timeout=60)
    assert len(writers) > 8
    assert threading.current_thread() not in writers, "the loop stood still"


async def test_a_stop_does_not_wait_for_the_disk_for_ever(host):
    """A cancellation waits for the write that is under way, and for no other."""
    host.on_step = lambda name: time.sleep(SLOW / 2) if name == "fsync" else None
    async with host.agent() as agent:
        agent.nursery.start_soon(agent.create, sandbox_id(1))
        while "fsync" not in host.steps:
            await trio.sleep(0.01)
        begun = host.steps.count("fsync")
        agent.nursery.cancel_scope.cancel()
        await trio.sleep_forever()
    assert host.steps.count("fsync") <= begun + 2  # of a file and its directory
