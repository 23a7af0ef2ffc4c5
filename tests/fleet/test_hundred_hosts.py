"""A hundred hosts."""

from __future__ import annotations

import trio

from capsule.model import CreateSandbox

HOSTS = 100


async def test_a_hundred_hosts_come_online_and_one_round_makes_rows_true(virtual_clock, fleet):
    """All of them are proven and listed by one monitor; sandboxes are spread over all; what one of them loses behind
    everybody's back is known within two rounds."""
    await fleet.add_hosts(HOSTS)
    await fleet.add_plane()
    assert await fleet.wait_online(15) < 15
    plane = fleet.planes[0]
    request = CreateSandbox(template="minimal", vcpus=1, memory_mb=512, timeout_sec=0, metadata={}, envs={})
    async with trio.open_nursery() as nursery:
        for _ in range(HOSTS):
            nursery.start_soon(plane.sandboxes.create, fleet.principal, request, None)
    assert [len(host.running()) for host in fleet.hosts] == [1] * HOSTS
    for host in fleet.hosts:
        (machine,) = host.machines().values()
        machine.die("its kernel panicked")
    began = trio.current_time()
    while await fleet.sql("select from sandboxes where status <> 'error'"):
        await trio.sleep(0.5)
    assert trio.current_time() - began <= 10
