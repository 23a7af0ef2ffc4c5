"""A fault that cannot be served ends its VM with a reason that names the file, and no other."""

from __future__ import annotations

import signal

import pytest
import trio

from agent.pager.service import PagingDamaged

PAGE = 4096


def flip(path, at):
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


async def ended(vmm):
    """How the VMM ended."""
    with trio.fail_after(30):
        return await vmm.process.wait()


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
async def test_a_damaged_data_file_ends_the_vm_with_its_name(world, snapshot, damage):
    """SIGKILL, never wrong content and never a hang; the reason outlives a restart of the pager, until the release.
    The files stay as they are. A VM that needs none of it goes on."""
    path = snapshot.data(0)
    other = await world.start(snapshot, "two", prefetch=False)
    assert await other.ask("verify 1 1") == "same"
    vmm = await world.start(snapshot)
    if damage == "flipped":
        flip(path, path.stat().st_size // 2)
    else:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
    damaged = path.read_bytes()
    await vmm.send("verify 1 0")
    assert await ended(vmm) == -signal.SIGKILL
    with trio.fail_after(20):
        while await world.client.failure("one") is None:
            await trio.sleep(0.01)
    for _ in range(2):
        assert str(path) in await world.client.failure("one")
        with pytest.raises(PagingDamaged, match=str(path)):
            await world.client.wait_connected("one", timeout=1)
        await world.kill_pager()
    assert path.read_bytes() == damaged
    assert await other.ask("verify 2 1") == "same"
    await world.client.release("one")
    assert await world.client.failure("one") is None
    await world.kill_pager()
    assert list(await world.client.statistics()) == ["two"]


async def test_damage_in_the_working_set_ends_the_vm_before_it_runs(world, snapshot):
    """The prefetch finds it: whoever waits for the VM to be ready gets the reason."""
    page = next(at for at in range(0, len(snapshot.memory), PAGE) if snapshot.memory[at : at + 64] != bytes(64))
    vmm = await world.start(snapshot)
    await vmm.ask(f"peek {page}")
    await world.client.record_working_set("one")
    await world.client.release("one")
    for number in range(2):
        for at in range(0, snapshot.data(number).stat().st_size, 65536):
            flip(snapshot.data(number), at)
    vm = world.vm(snapshot, "two")
    await world.client.listen(vm)
    await world.spawn(vm, 8, 1, "-")
    with pytest.raises(PagingDamaged, match="is damaged"):
        await world.client.wait_connected("two", timeout=30)
