"""A VMM's memory served by the real process: content, figures, what the kernel counts as written."""

from __future__ import annotations


async def test_memory_touched_in_random_order_from_several_threads_is_the_snapshot(world, snapshot):
    """Four threads read every page in an order of their own: each finds the snapshot's content, whatever run, build or
    hole it lies in."""
    vmm = await world.start(snapshot)
    assert await vmm.ask("verify 4 7") == "same"
    figures = (await world.client.statistics())["one"]
    assert figures.connected
    assert figures.fault_bytes == len(snapshot.memory)
    assert 0 < figures.faults
    assert sum(figures.latency) == figures.faults
