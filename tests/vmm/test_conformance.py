"""What every VMM driver promises (agent/vmm/driver.py), the fake included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from agent.vmm.driver import MAX_CONSOLE_BYTES, VmStartFailed


async def test_a_booted_vm_is_in_the_process_table(bench):
    """It has an identity and a cost, and is found by its directory alone."""
    spec = bench.spec()
    vm = await bench.driver.boot(spec)
    assert vm.statistics().resident_bytes > 0
    assert bench.driver.find_orphans(bench.root) == {spec.directory: vm.process}
    assert bench.driver.find_orphans(bench.root / "elsewhere") == {}


async def test_a_killed_vm_is_gone_when_kill_returns(bench):
    """No process, no cost, its end is known; a second kill is harmless."""
    vm = await bench.driver.boot(bench.spec())
    await vm.kill()
    assert vm.statistics() is None
    assert bench.driver.find_orphans(bench.root) == {}
    assert await vm.wait_exit() == "the VM was ended by the agent"
    await vm.kill()


async def test_a_crash_wakes_everybody_who_waits(bench):
    """Any number of tasks may wait for the end; all learn the reason, early and late ones."""
    vm = await bench.driver.boot(bench.spec())
    reasons = []

    async def wait():
        reasons.append(await vm.wait_exit())

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        bench.crash(vm)
    await wait()
    assert len(reasons) == 4
    assert len(set(reasons)) == 1
    assert reasons[0]


async def test_waiting_can_be_given_up(bench):
    """Cancelling who waits does nothing to the VM."""
    vm = await bench.driver.boot(bench.spec())
    with trio.move_on_after(0.1):
        await vm.wait_exit()
    assert vm.statistics() is not None


async def test_an_adopted_vm_can_be_watched_and_killed(bench):
    """What a new agent takes over is as good as what it started itself; the old handle learns of the end too."""
    spec = bench.spec()
    old = await bench.driver.boot(spec)
    adopted = await bench.driver.adopt(spec, old.process)
    assert adopted.process == old.process
    assert adopted.statistics() is not None
    await adopted.kill()
    assert await old.wait_exit()
    assert bench.driver.find_orphans(bench.root) == {}


async def test_what_is_not_that_vm_is_not_adopted(bench):
    """Another start time (the pid was used again), another sandbox, another directory, a VM that has gone: None."""
    spec = bench.spec()
    vm = await bench.driver.boot(spec)
    reused = replace(vm.process, start_time=vm.process.start_time + 1)
    assert await bench.driver.adopt(spec, reused) is None
    assert await bench.driver.adopt(replace(spec, sandbox_id="other"), vm.process) is None
    assert await bench.driver.adopt(replace(spec, directory=bench.root), vm.process) is None
    await vm.kill()
    assert await bench.driver.adopt(spec, vm.process) is None


async def test_a_vm_that_died_unseen_is_not_adopted(bench):
    """It crashed while no agent was there."""
    spec = bench.spec()
    vm = await bench.driver.boot(spec)
    bench.crash(vm)
    await vm.wait_exit()
    assert await bench.driver.adopt(spec, vm.process) is None


async def test_a_boot_that_fails_leaves_nothing(bench):
    """A typed error with the reason, and no process."""
    with pytest.raises(VmStartFailed, match="kernel"):
        await bench.driver.boot(bench.doomed_spec())
    assert bench.driver.find_orphans(bench.root) == {}


async def test_a_process_is_killed_by_its_identity(bench):
    """For orphans nothing but the identity is known; one whose pid was used again is left alone."""
    vm = await bench.driver.boot(bench.spec())
    await bench.driver.kill_process(replace(vm.process, start_time=vm.process.start_time + 1))
    assert vm.statistics() is not None
    await bench.driver.kill_process(vm.process)
    assert bench.driver.find_orphans(bench.root) == {}
    await bench.driver.kill_process(vm.process)


async def test_the_end_of_one_vm_is_not_the_end_of_another(bench):
    """Two VMs side by side; one is killed."""
    first = await bench.driver.boot(bench.spec("first"))
    second = await bench.driver.boot(bench.spec("second"))
    await first.kill()
    await bench.driver.remove_leftovers()
    assert second.statistics() is not None
    assert bench.driver.find_orphans(bench.root) == {bench.root / "second": second.process}


async def test_the_console_can_always_be_asked_for(bench):
    """While the VM lives and after: text of bounded length, never an error."""
    vm = await bench.driver.boot(bench.spec())
    assert len(await vm.console_tail()) <= MAX_CONSOLE_BYTES
    bench.crash(vm)
    await vm.wait_exit()
    assert len(await vm.console_tail()) <= MAX_CONSOLE_BYTES
