"""What a host does when its control plane is lost: everything that runs is paused, and told."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise

import pytest
import trio
from sandbox_world import sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.enrol.presence import Presence, PresenceCell
from agent.sandboxes import reaper
from agent.sandboxes.commands import Unasked
from agent.sandboxes.loss import AT_ONCE, PATIENCE, REASON, Loss
from agent.vmm.driver import VmDiskFull
from agent.wire.faults import Fault

ONE, TWO, THREE = (sandbox_id(number) for number in (1, 2, 3))


@asynccontextmanager
async def losing(host, state="online", **options):
    """An agent that pauses on loss; its presence is ours to say."""
    async with host.agent(**options) as agent:
        agent.presence = PresenceCell(Presence(state, trio.current_time()))
        agent.nursery.start_soon(Loss(agent.manager, agent.presence).run)
        agent.become = lambda state: agent.presence.publish(Presence(state, trio.current_time()))
        yield agent


@pytest.mark.parametrize("state", ["lost", "refused"])
async def test_everything_is_paused_and_told(host, autojump_clock, state):
    """Not before the loss; each with its reason; what rested already is left alone; nothing is resumed afterwards."""
    async with losing(host) as agent:
        for name in (ONE, TWO, THREE):
            await agent.create(name)
        await agent.pause(THREE)
        await trio.sleep(1000)
        assert agent.told() == []
        agent.become(state)
        await trio.sleep(1)
        assert set(agent.statuses().values()) == {"paused"}
        assert sorted(agent.told()) == [(ONE, "auto_paused"), (TWO, "auto_paused")]
        assert {entry.reason for entry in agent.outbox.entries()} == {REASON}
        await agent.check()
        agent.become("online")
        await trio.sleep(1000)
        assert set(agent.statuses().values()) == {"paused"}
        await agent.resume(ONE)
        await trio.sleep(1000)
        assert agent.statuses()[ONE] == "running"


async def test_a_few_at_once(make_host, autojump_clock):
    """All of many, at most so many at a time; while one waits, another is paused."""
    host = make_host(slots=12)
    async with losing(host, captures=trio.CapacityLimiter(100)) as agent:
        names = [sandbox_id(number) for number in range(1, 12)]
        for name in names:
            await agent.create(name)
        most = [0]

        def on_step(_):
            pausing = [status for status in agent.statuses().values() if status == "pausing"]
            most[0] = max(most[0], len(pausing))

        host.on_step = on_step
        agent.become("lost")
        await trio.sleep(10)
        assert set(agent.statuses().values()) == {"paused"}
        assert len(agent.told()) == len(names)
    assert 2 <= most[0] <= AT_ONCE


async def test_what_comes_to_run_during_the_loss(host, autojump_clock):
    """A create that was under way, and a resume by somebody who can still reach us, are paused as soon as they run."""
    async with losing(host) as agent, trio.open_nursery() as nursery:
        agent.become("lost")
        nursery.start_soon(agent.create, ONE)
        await trio.sleep(5)
        assert agent.statuses() == {ONE: "paused"}
        await agent.resume(ONE)
        await trio.sleep(5)
        assert agent.statuses() == {ONE: "paused"}
        assert agent.told() == [(ONE, "auto_paused")] * 2
        await agent.check()


async def test_failures_are_tried_again_while_the_loss_lasts(host, autojump_clock):
    """With growing pauses, told once for the streak; others are paused meanwhile."""
    attempts = []
    async with losing(host) as agent:
        await agent.create(ONE)
        await agent.create(TWO)
        vm = agent.manager.find(ONE).made.vm
        save_state = vm.save_state

        async def fail(*arguments, **options):
            attempts.append(trio.current_time())
            if len(attempts) < 6:
                raise VmDiskFull("full")
            await save_state(*arguments, **options)

        vm.save_state = fail
        agent.become("lost")
        await trio.sleep(1)
        assert agent.statuses() == {ONE: "running", TWO: "paused"}
        await trio.sleep(1000)
        assert agent.statuses() == {ONE: "paused", TWO: "paused"}
        assert sorted(agent.told()) == [(ONE, "auto_paused"), (ONE, "pause_failed"), (TWO, "auto_paused")]
        gaps = [after - before for before, after in pairwise(attempts)]
        assert len(gaps) == 5
        assert gaps == sorted(gaps)
        assert gaps[-1] > 4 * gaps[0]


async def test_it_stops_when_the_control_plane_is_back(host, autojump_clock):
    """What failed is not tried again, and what waits for its turn in a sandbox's own life is not wanted any more."""
    async with losing(host) as agent:
        await agent.create(ONE)

        def on_step(name):
            if name == "save_state":
                raise VmDiskFull("full")

        host.on_step = on_step
        agent.become("lost")
        await trio.sleep(1)
        agent.become("online")
        host.on_step = lambda _: None
        await trio.sleep(1000)
        assert agent.statuses() == {ONE: "running"}

        agent.become("lost")
        while agent.manager.find(ONE).commands.idle():
            await trio.lowlevel.checkpoint()
        agent.become("online")  # before its life has had a look
        await trio.sleep(1000)
        assert agent.statuses() == {ONE: "running"}
        assert agent.told() == [(ONE, "pause_failed")]


async def test_a_vm_that_hangs_does_not_hold_up_the_rest(host, autojump_clock):
    """Its turn goes to another after a while; it is paused when it can be."""
    release = trio.Event()
    *hung, other = [sandbox_id(number) for number in range(1, AT_ONCE + 2)]

    async def hang(pause):
        await release.wait()
        await pause()

    async with losing(host, captures=trio.CapacityLimiter(100)) as agent:
        for name in hung:
            await agent.create(name)
            vm = agent.manager.find(name).made.vm
            vm.pause = partial(hang, vm.pause)
        agent.become("lost")
        await trio.sleep(PATIENCE / 4)
        await agent.create(other)
        await trio.sleep(PATIENCE / 4)
        before = agent.statuses()[other]
        await trio.sleep(PATIENCE)
        assert (before, agent.statuses()[other]) == ("running", "paused")
        release.set()
        await trio.sleep(400)
        assert set(agent.statuses().values()) == {"paused"}
        assert len(agent.told()) == AT_ONCE + 1


async def test_beside_the_reaper_a_user_and_a_destroy(host, autojump_clock, monkeypatch):
    """Whoever comes first: one pause. What a user asked for is not told as ours; a loss outlasts idleness; destroyed
    is destroyed."""
    monkeypatch.setattr(reaper, "EVERY", 1e9)  # we are the reaper
    async with losing(host) as agent:
        await agent.create(ONE, timeout_sec=60)
        sandbox = agent.manager.find(ONE)
        for first in ("user", "loss"):
            if first == "user":
                slot = sandbox.pause()
                agent.become("lost")
            else:
                agent.become("lost")
                while sandbox.commands.idle():
                    await trio.lowlevel.checkpoint()
                slot = sandbox.pause()
            assert (await slot.wait()).status == "paused"
            assert agent.told() == []
            agent.become("online")
            await agent.resume(ONE)
        await trio.sleep(61)
        sandbox.pause_idle()
        sandbox.pause(unasked=Unasked(REASON, lambda: True))
        sandbox.touch()  # not idle any more, and lost all the same
        await trio.sleep(1)
        assert agent.statuses() == {ONE: "paused"}
        assert [entry.reason for entry in agent.outbox.entries()] == [REASON]
        agent.become("online")
        await agent.create(TWO)
        sandbox = agent.manager.find(TWO)
        agent.become("lost")
        while sandbox.commands.idle():
            await trio.lowlevel.checkpoint()
        await agent.destroy(TWO)
        await trio.sleep(1000)
        assert agent.statuses() == {ONE: "paused"}
        await agent.check()


async def test_lost_from_the_start(host, autojump_clock):
    """An agent that is restarted during a loss pauses what it adopted."""
    async with host.agent() as agent:
        await agent.create(ONE)
    async with losing(host, "starting") as agent:
        await trio.sleep(50)
        assert agent.statuses() == {ONE: "running"}
        agent.become("lost")
        await trio.sleep(1)
        assert agent.statuses() == {ONE: "paused"}
        assert agent.told() == [(ONE, "auto_paused")]


async def test_killed_at_any_step_of_a_loss(make_host, autojump_clock):
    """Whenever the agent dies: what its record calls paused is told by the next, what is not yet runs on."""
    for point in range(1, 200):
        host = make_host()

        async def begin(agent):
            await agent.create(ONE)

        async def lose(agent):
            presence = PresenceCell(Presence("lost", trio.current_time()))
            agent.nursery.start_soon(Loss(agent.manager, presence).run)
            await trio.sleep(5)
            await wait_all_tasks_blocked()

        async def settle(agent):
            await wait_all_tasks_blocked()
            await agent.check()

        await host.live(begin)
        first = await host.live(lose, crash_at=point)
        host.pager.forget_dead()
        last = await host.live(settle)
        assert last.finished
        if host.state.load()[ONE].phase == "paused":
            assert (ONE, "auto_paused") in last.told(), f"killed at {point}"
        if first.finished:
            break
    assert point > 10


async def test_a_host_that_drains_pauses_nothing_more(host, autojump_clock):
    """A stop during a loss is a stop: VMs live on."""
    async with losing(host) as agent:
        await agent.create(ONE)
        agent.manager.drain()
        with pytest.raises(Fault, match="takes no new"):
            await agent.create(TWO)
        agent.become("lost")
        await trio.sleep(1)
    assert host.state.load()[ONE].phase in {"running", "paused"}
