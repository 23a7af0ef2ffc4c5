"""What /metrics says of the fleet: the live figures of this moment."""

from __future__ import annotations

import trio
from prometheus_client import CollectorRegistry, generate_latest

from capsule.gauges import FleetGauges


async def test_the_figures_are_those_of_the_moment(virtual_clock, world, agent, plane, request_body, nursery):
    """A create under way, a link that is up, a monitor that leads, and the database's pool."""
    registry = CollectorRegistry()
    FleetGauges(world.db, plane.links, plane.operations, plane.monitor).register(registry)

    def value(name, **labels):
        return registry.get_sample_value(name, labels)

    assert value("capsule_operations") == value("capsule_host_links") == value("capsule_monitor_leads") == 0
    gate = agent.hold("sandbox.create")
    nursery.start_soon(plane.sandboxes.create, world.principal, request_body, None)
    nursery.start_soon(plane.monitor.run)
    await agent.reached["sandbox.create"].wait()
    await trio.sleep(10)
    assert value("capsule_operations") == value("capsule_host_links_connected") == value("capsule_monitor_leads") == 1
    assert value("capsule_database_pool", figure="calls") > 0
    gate.set()
    await world.settle()
    with trio.fail_after(30):  # the monitor may have written the outcome first
        while value("capsule_operations"):
            await trio.sleep(0.1)
    assert b"# HELP capsule_operations" in generate_latest(registry)
