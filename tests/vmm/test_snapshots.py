"""What every VMM driver promises about pausing, saving and restoring, the fake included."""

from __future__ import annotations

import os
import stat

import pytest
import trio

from agent.vmm.driver import VmGone, VmStartFailed, VmStateFailed


async def test_a_paused_guest_stands_still(bench):
    """No instruction of it is executed between pause and resume; then it goes on. Each may be said twice."""
    vm = await bench.driver.boot(bench.counting_spec())
    await bench.count(vm)
    assert not await vm.paused()
    await vm.pause()
    await vm.pause()
    assert await vm.paused()
    assert await bench.stands(vm)
    before = await bench.counted(vm)
    await vm.resume()
    await vm.resume()
    assert not await vm.paused()
    assert await bench.count(vm) > before


async def test_a_saved_vm_goes_on_and_is_saved_again(bench):
    """Saving takes nothing from the VM: it is paused as before, resumes, and can be saved once more."""
    vm = await bench.driver.boot(bench.counting_spec())
    await bench.count(vm)
    first = await bench.save(vm, "first")
    assert await vm.paused()
    assert await bench.stands(vm)
    await vm.resume()
    assert await bench.count(vm) > first.counted
    second = await bench.save(vm, "second")
    assert second.counted > first.counted
    assert first.state.stat().st_size > 0
    assert stat.S_IMODE(first.state.stat().st_mode) & 0o077 == 0


async def test_a_restored_vm_is_where_the_saved_one_was(bench):
    """Twice from one state, while the source runs on: both clones are paused first and count on from there."""
    source = await bench.driver.boot(bench.counting_spec("source"))
    await bench.count(source)
    saved = await bench.save(source)
    await source.resume()
    for name in ("first", "second"):
        clone = await bench.restore(bench.counting_spec(name), saved)
        assert await clone.paused()
        await clone.resume()
        assert await first_count(bench, clone) == saved.counted + 1
    await bench.count(source)


async def first_count(bench, vm):
    """The first tick a restored VM makes."""
    if hasattr(bench, "ticks"):
        await bench.count(vm)
        return (await bench.ticks(vm))[0][0]
    return await bench.count(vm)


async def test_a_restored_vm_is_a_vm_like_any_other(bench):
    """Found by its directory, adopted while paused, resumed, its end noticed, and killed."""
    source = await bench.driver.boot(bench.counting_spec("source"))
    await bench.count(source)
    saved = await bench.save(source)
    await source.kill()
    spec = bench.counting_spec("clone")
    clone = await bench.restore(spec, saved)
    assert clone.statistics().resident_bytes > 0
    assert bench.driver.find_orphans(bench.root) == {spec.directory: clone.process}
    adopted = await bench.driver.adopt(spec, clone.process)
    assert await adopted.paused()
    await adopted.resume()
    await bench.count(adopted)
    await adopted.kill()
    assert await adopted.wait_exit() == "the VM was ended by the agent"
    assert await clone.wait_exit()
    assert bench.driver.find_orphans(bench.root) == {}


async def test_a_restored_vm_is_saved_again(bench):
    """The next generation: it counts on from its parent's number, which counted on from the first's."""
    spec = bench.counting_spec("first")
    vm = await bench.driver.boot(spec)
    await bench.count(vm)
    numbers = []
    for name in ("second", "third"):
        saved = await bench.save(vm, name)
        numbers.append(saved.counted)
        await vm.kill()
        if hasattr(bench.driver, "machines"):
            machine_memory(saved)
        vm = await bench.restore(bench.counting_spec(name), saved)
        await vm.resume()
        await bench.count(vm)
    assert numbers == sorted(set(numbers))


def machine_memory(saved):
    """The fake's guest notes its count in its first page: what was captured holds it."""
    assert int.from_bytes(saved.memory.read_bytes()[:8], "little") == saved.counted


async def test_memory_is_found_and_cannot_be_written(bench):
    """All of it, through a descriptor that only reads; after the VM's end a typed error."""
    spec = bench.counting_spec()
    vm = await bench.driver.boot(spec)
    await bench.count(vm)
    memory = vm.memory()
    try:
        assert (memory.pid, memory.size) == (vm.process.pid, spec.memory_mb << 20)
        assert memory.address % 4096 == 0
        assert os.fstat(memory.fd).st_size >= memory.size
        assert os.lseek(memory.fd, 0, os.SEEK_DATA) >= 0
        with pytest.raises(OSError):
            os.pwrite(memory.fd, b"x", 0)
    finally:
        os.close(memory.fd)
    await vm.kill()
    with pytest.raises(VmGone):
        vm.memory()


async def test_a_running_vm_is_not_saved(bench):
    """It must be paused first: a state of other memory than is captured would be worthless. It runs on."""
    vm = await bench.driver.boot(bench.counting_spec())
    with pytest.raises(VmStateFailed, match="paused"):
        await vm.save_state(bench.root / "state")
    assert not (bench.root / "state").exists()
    await bench.count(vm)


async def test_a_state_overwrites_nothing(bench):
    """A file of that name is somebody else's: it stays, and the VM can be resumed."""
    vm = await bench.driver.boot(bench.counting_spec())
    await bench.count(vm)
    (bench.root / "state").write_text("mine")
    await vm.pause()
    with pytest.raises(VmStateFailed, match="state"):
        await vm.save_state(bench.root / "state")
    assert (bench.root / "state").read_text() == "mine"
    await vm.resume()
    await bench.count(vm)


async def test_once_saved_a_vm_is_saved_again_only_after_it_has_run(bench):
    """QEMU's rule, and so everybody's: refused with a typed error, and the VM resumes all the same."""
    vm = await bench.driver.boot(bench.counting_spec())
    await bench.count(vm)
    await bench.save(vm)
    with pytest.raises(VmStateFailed):
        await vm.save_state(bench.root / "again")
    assert not (bench.root / "again").exists()
    await vm.resume()
    await bench.count(vm)
    await bench.save(vm, "third")


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "absent"])
async def test_a_damaged_state_starts_nothing(bench, damage):
    """VmStartFailed with the VMM's own words, and no process."""
    state, memory = bench.root / "state", bench.root / "memory"
    if damage != "absent":
        source = await bench.driver.boot(bench.counting_spec("source"))
        await bench.count(source)
        saved = await bench.save(source, "good")
        await source.kill()
        content = saved.state.read_bytes()
        damaged = {"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"x" * 5000}
        state.write_bytes(damaged[damage])
        memory = saved.memory
    spec = bench.counting_spec("clone")
    from_damaged = type("Saved", (), {"state": state, "memory": memory})
    with pytest.raises(VmStartFailed, match=r"load of migration failed|No such file"):
        await bench.restore(spec, from_damaged)
    assert bench.driver.find_orphans(bench.root) == {}


async def test_a_pivot_changes_where_the_vm_writes(bench):
    """Running or paused: the file is another one from then on, and the guest notices nothing."""
    spec = bench.counting_spec()
    vm = await bench.driver.boot(spec)
    await bench.count(vm)
    assert await vm.disk_file() == spec.disk
    for name in ("second.qcow2", "third.qcow2"):
        overlay = bench.overlay(spec.directory / name)
        await vm.pivot_disk(overlay)
        assert await vm.disk_file() == overlay
        await bench.count(vm)
    await vm.pause()
    overlay = bench.overlay(spec.directory / "fourth.qcow2")
    await vm.pivot_disk(overlay)
    await vm.resume()
    await bench.count(vm)
    adopted = await bench.driver.adopt(spec, vm.process)
    assert await adopted.disk_file() == overlay


async def test_commands_to_a_dead_vm_say_so(bench):
    """VmGone, whatever is asked."""
    spec = bench.counting_spec()
    vm = await bench.driver.boot(spec)
    bench.crash(vm)
    await vm.wait_exit()
    overlay = bench.overlay(spec.directory / "next.qcow2")
    for ask in (
        vm.pause,
        vm.resume,
        vm.paused,
        vm.disk_file,
        lambda: vm.pivot_disk(overlay),
        lambda: vm.save_state(bench.root / "state"),
    ):
        with pytest.raises(VmGone):
            await ask()
    assert not (bench.root / "state").exists()


async def test_a_paused_vm_can_be_killed(bench):
    """Its vCPUs stand; its process ends like any other."""
    vm = await bench.driver.boot(bench.counting_spec())
    await vm.pause()
    await vm.kill()
    assert await vm.wait_exit() == "the VM was ended by the agent"
    assert bench.driver.find_orphans(bench.root) == {}


async def test_a_cancelled_restore_leaves_no_process(bench):
    """At once, and at any later moment."""
    source = await bench.driver.boot(bench.counting_spec("source"))
    await bench.count(source)
    saved = await bench.save(source)
    await source.kill()
    for number, delay in enumerate((0, 0.01, 0.03, 0.06)):
        spec = bench.counting_spec(f"clone-{number}")
        with trio.move_on_after(delay) as scope:
            await (await bench.restore(spec, saved)).kill()
            scope.cancel()
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert bench.driver.find_orphans(bench.root) == {}


async def test_a_version_is_told(bench):
    """It begins with the driver's name."""
    assert bench.driver.version().startswith(f"{bench.driver.name} ")
