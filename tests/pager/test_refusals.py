"""VMMs that never come, come wrong, say nothing or lie: the agent learns why, nothing hangs, nothing is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from agent.pager.service import ConnectTimeout, NotPaged, PagingFailed


async def open_descriptors(world):
    """How many the pager has; that of our connection is among them."""
    await world.client.statistics()
    return count_descriptors(world.pager_pid())


def count_descriptors(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def come_back_to(world, before):
    """Wait until the pager has no more than so many: its supervisor, too, asks it something now and then."""
    with trio.fail_after(20):
        while await open_descriptors(world) != before:
            await trio.sleep(0.01)


async def test_a_vmm_that_never_connects(world, snapshot):
    """The agent's own wait ends first, and may be repeated; then the pager gives up: no socket, a reason. Releasing
    does not hang, neither before nor after."""
    before = await open_descriptors(world)
    await world.client.listen(world.vm(snapshot))
    with pytest.raises(ConnectTimeout):
        await world.client.wait_connected("one", timeout=0.05)
    with pytest.raises(PagingFailed, match="has not connected"):
        await world.client.wait_connected("one", timeout=30)
    assert not world.vm(snapshot).socket.exists()
    assert "has not connected" in await world.client.failure("one")
    with trio.fail_after(20):
        await world.client.release("one")
        await world.client.listen(world.vm(snapshot))
        figures = await world.client.release("one")
    assert not figures.connected
    assert not world.vm(snapshot).socket.exists()
    with pytest.raises(NotPaged):
        await world.client.wait_connected("one", timeout=1)
    await come_back_to(world, before)


async def test_who_waits_for_a_vm_that_is_released_is_told(world, snapshot):
    await world.client.listen(world.vm(snapshot))
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def wait():
            with pytest.raises(NotPaged):
                await world.client.wait_connected("one", timeout=30)

        await trio.sleep(0.05)
        await world.client.release("one")


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("rubbish", "cannot be read"),
        ("none", "has 0 descriptors"),
        ("two", "has 2 descriptors"),
        ("many", "too long"),
        ("pipe", "not one userfaultfd"),
        ("large", "another VM"),
        ("long", "too long|cannot be read"),
        ("closed", "has not kept"),
        ("dies", "empty"),
    ],
)
async def test_a_wrong_handshake_is_refused_and_leaves_nothing(world, snapshot, mode, why):
    """With a reason the agent can show; no descriptor stays open, and the pager serves on."""
    before = await open_descriptors(world)
    vm = world.vm(snapshot)
    await world.client.listen(vm)
    os.kill(world.pager_pid(), signal.SIGSTOP)  # so that it looks when everything has been done
    await world.rude(vm, mode)
    os.kill(world.pager_pid(), signal.SIGCONT)
    with pytest.raises(PagingFailed, match=why) as caught:
        await world.client.wait_connected("one", timeout=30)
    assert type(caught.value) is PagingFailed
    assert await world.client.failure("one")
    assert await world.client.damage("one") is None
    assert not vm.socket.exists()
    await come_back_to(world, before)
    await world.client.release("one")
    vmm = await world.start(snapshot)
    assert await vmm.ask("verify 1 1") == "same"


async def test_strangers_and_silent_ones_are_sent_away_and_the_right_one_is_served(world, snapshot):
    """Another user's process gets no further than the socket's mode; where that is open, its credentials tell."""
    vm = world.vm(snapshot)
    await world.client.listen(vm)
    await world.rude(vm, "stranger")
    vm.socket.chmod(0o777)
    await world.rude(vm, "stranger")
    vmm = await world.spawn(vm, 8, 1, "-", snapshot.model)
    await world.client.wait_connected("one", timeout=30)
    assert await vmm.ask("verify 1 1") == "same"
    assert "stranger_refused" in world.log()


async def test_a_silent_one_is_the_time_out_of_its_vm(world, snapshot):
    vm = world.vm(snapshot)
    await world.client.listen(vm)
    await world.rude(vm, "silent")
    with pytest.raises(PagingFailed, match="has not connected"):
        await world.client.wait_connected("one", timeout=30)


async def test_a_vmm_that_dies_after_its_handshake_is_over(world, snapshot):
    """No failure of the pager's; its descriptors and its record are gone."""
    before = await open_descriptors(world)
    vmm = await world.start(snapshot)
    vmm.process.kill()
    await vmm.process.wait()
    with trio.fail_after(20):
        while (await world.client.statistics())["one"].connected:
            await trio.sleep(0.01)
    assert await world.client.failure("one") is None
    with pytest.raises(PagingFailed, match="ended"):
        await world.client.wait_connected("one", timeout=1)
    with trio.fail_after(20):
        while list((world.directory / "vms").iterdir()):
            await trio.sleep(0.01)
    await come_back_to(world, before)


async def test_a_vmm_that_dies_in_the_middle_of_a_storm_is_over(world, large_snapshot):
    """Copies into a process that is ending fail (ESRCH), and that is no failure of the VM's data."""
    for number in range(3):
        vmm = await world.start(large_snapshot, f"vm-{number}")
        await vmm.send("verify 4 8")
        await trio.sleep(0.01 * number)
        vmm.process.kill()
        await vmm.process.wait()
        assert await world.client.failure(f"vm-{number}") is None
        await world.client.release(f"vm-{number}")
    vmm = await world.start(large_snapshot)
    assert await vmm.ask("verify 2 2") == "same"
