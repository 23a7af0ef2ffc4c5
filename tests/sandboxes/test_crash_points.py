"""The agent is killed at every single step of its work, and then the next one at every step of taking over."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
from sandbox_world import sandbox_id
from trio.testing import wait_all_tasks_blocked

FIRST, SECOND, THIRD, LAST = (sandbox_id(number) for number in range(1, 5))


@dataclass
class Seen:
    """What those outside know when the agent is killed."""

    asked: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)
    died: set[str] = field(default_factory=set)
    unwanted: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)

    async def create(self, agent, name):
        self.asked.add(name)
        await agent.create(name)
        self.ran.add(name)

    async def destroy(self, agent, name):
        self.unwanted.add(name)
        await agent.destroy(name)
        self.gone.add(name)

    def die(self, agent, name):
        self.died.add(name)
        agent.host.vms.machine(name).die("the guest's kernel panicked")

    async def check(self, agent):
        """Every sandbox is there and runs, or is gone without a trace; what was promised holds."""
        await agent.check()
        alive = set(agent.statuses())
        assert self.ran - self.died - self.unwanted <= alive, "a sandbox that was told to run is lost"
        assert alive <= self.asked - self.gone - self.died
        told = {name for name, event in agent.told() if event == "died"}
        assert self.died <= told <= self.died, "a death was not told, or one that was none"
        for name in alive:
            guest = agent.manager.find(name).guest()
            assert (await guest.call("exec", {"cmd": "true"}, timeout=5))["exit_code"] == 0


async def script(seen, agent):
    """One of everything."""
    await seen.create(agent, FIRST)
    await seen.create(agent, SECOND)
    await seen.create(agent, LAST)
    await seen.destroy(agent, SECOND)
    seen.die(agent, FIRST)
    await wait_all_tasks_blocked()
    await seen.create(agent, THIRD)
    await seen.destroy(agent, THIRD)


async def recover(agent):
    await wait_all_tasks_blocked()


async def clear(seen, agent):
    """What is left can be used and destroyed, and then there is nothing at all."""
    await seen.check(agent)
    for name in set(agent.statuses()):
        await agent.destroy(name)
    await agent.check()
    assert agent.host.running() == set()


async def test_killed_at_every_step(make_host, autojump_clock):
    """Each step of a script of creates, destroys and a death is the last one once."""
    for point in range(1, 1000):
        host, seen = make_host(), Seen()
        first = await host.live(partial(script, seen), crash_at=point)
        second = await host.live(partial(clear, seen))
        assert second.finished, f"killed at {point}"
        if first.finished:
            break
    assert point > 60, "the script has more steps than that"


@pytest.mark.parametrize("part", range(0, 12, 3))
async def test_killed_again_at_every_step_of_taking_over(make_host, autojump_clock, part):
    """The same with a second death: of the agent that takes over, at each of its steps (for every third first one)."""
    for point in range(part + 1, 1000, 12):
        for again in range(1, 1000):
            host, seen = make_host(), Seen()
            first = await host.live(partial(script, seen), crash_at=point)
            second = await host.live(recover, crash_at=again)
            third = await host.live(partial(clear, seen))
            assert third.finished, f"killed at {point} and {again}"
            if second.finished:
                break
        if first.finished:
            break


async def test_killed_while_a_build_waits(make_host, autojump_clock):
    """At a VMM that does not come up, and at a guest that is silent: collected, the VM ended, the id free again."""
    for hang in ("vmm", "guest"):
        host, seen = make_host(), Seen()
        host.guest_options = {"boots": hang == "vmm"}
        async with host.agent() as agent:
            if hang == "vmm":
                host.vms.boot_gate.__init__()
            agent.nursery.start_soon(seen.create, agent, FIRST)
            await wait_all_tasks_blocked()
            assert host.running() == {FIRST}
            agent.kill()
        assert host.running() == {FIRST}, "a killed agent ends no VM"
        host.vms.boot_gate.set()
        host.guest_options = {}
        async with host.agent() as agent:
            await agent.check()
            assert host.running() == set()
            await agent.create(FIRST)
            await agent.check()


async def test_stopped_at_any_moment_ends_no_running_vm(make_host, autojump_clock):
    """SIGTERM is a cancellation: at whatever step it comes, VMs that run go on, and the next agent has them."""
    for point in range(1, 1000):
        host, seen = make_host(), Seen()
        first = await host.live(partial(script, seen), stop_at=point)
        assert seen.ran - seen.died - seen.unwanted <= host.running()
        second = await host.live(partial(clear, seen))
        assert second.finished, f"stopped at {point}"
        if first.finished:
            break
    assert point > 60
