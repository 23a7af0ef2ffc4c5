"""What every Pager promises (agent/pager/service.py), the fake included."""

from __future__ import annotations

import pytest
import trio

from agent.pager.fake import FakePager
from agent.pager.service import ConnectTimeout, NotPaged, PagingDamaged


class FakeBench:
    def __init__(self, snapshot, world):
        self.pager = FakePager()
        self.pager.hold_connections = True
        self.vm = world.vm

    async def connect(self, vm):
        self.pager.connect(vm.vm_id)

    async def touch(self, vm_id):
        self.pager.touch(vm_id, 3)

    async def damage(self, vm_id):
        self.pager.fail_vm(vm_id, "builds/x/data is damaged")


class RealBench:
    def __init__(self, snapshot, world):
        self.pager = world.client
        self.snapshot = snapshot
        self.world = world
        self.vm = world.vm
        self.vmms = {}

    async def connect(self, vm):
        self.vmms[vm.vm_id] = await self.world.spawn(vm, 8, 1, "-", self.snapshot.model)

    async def touch(self, vm_id):
        await self.vmms[vm_id].ask("read 0 4000000 500000")

    async def damage(self, vm_id):
        for number in range(2):
            path = self.snapshot.data(number)
            path.chmod(0o600)
            path.write_bytes(bytes(path.stat().st_size))
        await self.vmms[vm_id].send("verify 1 0")
        with trio.fail_after(20):
            while await self.pager.failure(vm_id) is None:
                await trio.sleep(0.01)


@pytest.fixture(params=[FakeBench, RealBench])
def bench(request, snapshot, world):
    return request.param(snapshot, world)


async def test_from_listening_to_release(bench, snapshot):
    """Not connected, connected, figures that grow, gone."""
    pager, vm = bench.pager, bench.vm(snapshot)
    await pager.listen(vm)
    assert not (await pager.statistics())["one"].connected
    with pytest.raises(ConnectTimeout):
        await pager.wait_connected("one", timeout=0.01)
    await bench.connect(vm)
    await pager.wait_connected("one", timeout=30)
    await bench.touch("one")
    figures = (await pager.statistics())["one"]
    assert figures.connected
    assert figures.faults == sum(figures.latency) > 0
    await pager.record_working_set("one")
    await pager.record_working_set("one")
    assert await pager.failure("one") is None
    assert (await pager.release("one")).faults == figures.faults
    assert await pager.release("one") is None
    assert await pager.statistics() == {}


async def test_the_unknown_vm(bench):
    """Waiting and recording are refused; release and failure are harmless."""
    with pytest.raises(NotPaged):
        await bench.pager.wait_connected("nobody", timeout=1)
    with pytest.raises(NotPaged):
        await bench.pager.record_working_set("nobody")
    assert await bench.pager.release("nobody") is None
    assert await bench.pager.failure("nobody") is None
    assert await bench.pager.damage("nobody") is None


async def test_a_failure_is_kept_until_the_release(bench, snapshot):
    pager, vm = bench.pager, bench.vm(snapshot)
    await pager.listen(vm)
    await bench.connect(vm)
    await pager.wait_connected("one", timeout=30)
    await bench.damage("one")
    reason = await pager.failure("one")
    assert "is damaged" in reason
    assert await pager.damage("one") == reason
    with pytest.raises(PagingDamaged, match="is damaged"):
        await pager.wait_connected("one", timeout=30)
    assert not (await pager.statistics())["one"].connected
    await pager.release("one")
    assert await pager.failure("one") is None


async def test_a_second_listen_starts_anew(bench, snapshot):
    """Who waited for the first is told; the second is served."""
    pager, vm = bench.pager, bench.vm(snapshot)
    await pager.listen(vm)
    async with trio.open_nursery() as nursery:

        async def wait():
            with pytest.raises(NotPaged):
                await pager.wait_connected("one", timeout=30)

        nursery.start_soon(wait)
        await trio.sleep(0.05)
        await pager.listen(vm)
    await bench.connect(vm)
    await pager.wait_connected("one", timeout=30)
