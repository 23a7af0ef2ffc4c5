"""A sandbox from create to destroy, and every race between the two."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
from sandbox_world import create_body, request, sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.wire.faults import Fault, FaultCode

ONE, TWO = sandbox_id(1), sandbox_id(2)


async def test_create_call_destroy(host, autojump_clock):
    """A whole life over the wire: it runs, answers, is listed, and nothing is left of it at the end."""
    async with host.agent() as agent, agent.connection() as control_plane:
        state = await control_plane.call("sandbox.create", create_body(ONE, envs={"A": "b"}), timeout=60)
        assert state["status"] == "running"
        assert state["host_ip"].startswith("10.11.")
        assert {"queue", "slot", "overlay", "vmm", "guest"} <= state["timings_ms"].keys()
        guest = host.guests[state["host_ip"]]
        assert guest.configured["hostname"] == "sb"
        assert guest.configured["envs"] == {"A": "b"}
        assert len(guest.configured["entropy"]) == 64
        answer = await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "true", "args": []}, timeout=60)
        assert answer["exit_code"] == 0
        await control_plane.call("sandbox.ping", {"sandbox_id": ONE}, timeout=60)
        listing = await control_plane.call("host.list", {}, timeout=60)
        assert [one["sandbox_id"] for one in listing["sandboxes"]] == [ONE]
        await agent.check()
        await control_plane.call("sandbox.destroy", {"sandbox_id": ONE}, timeout=60)
        assert await control_plane.call("host.list", {}, timeout=60) == {}
        await agent.check()
        assert agent.manager.statistics() == {}


async def test_create_is_idempotent(host, autojump_clock):
    """The same id again is the same sandbox, also when its template has gone meanwhile."""
    async with host.agent() as agent:
        first = await agent.create(ONE)
        (host.images.path / "minimal" / "current").unlink()
        again = await agent.create(ONE)
        assert (again.host_ip, again.started_at) == (first.host_ip, first.started_at)
        assert len(host.vms.machines) == 1


async def test_two_creates_at_once(host, autojump_clock):
    """One sandbox, and both are answered."""
    answers = []
    async with host.agent() as agent:

        async def create():
            answers.append(await agent.create(ONE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            nursery.start_soon(create)
        assert answers[0] == answers[1]
        assert len(host.vms.machines) == 1
        await agent.check()


async def test_destroyed_ids_do_not_come_back(host, autojump_clock):
    """A create that was held up on the way is refused, whether or not the destroy found anything."""
    async with host.agent() as agent:
        await agent.destroy(ONE)
        await agent.create(TWO)
        await agent.destroy(TWO)
        for name in (ONE, TWO):
            with pytest.raises(Fault, match="has ended") as caught:
                await agent.create(name)
            assert caught.value.code == FaultCode.INVALID_STATE
        await agent.check()
        assert host.running() == set()


async def test_a_destroy_that_overtakes_the_image_wins(host, autojump_clock):
    """The create that was loading its image when the destroy came makes nothing."""
    async with host.agent() as agent:
        outcome = []

        async def create():
            with pytest.raises(Fault) as caught:
                await agent.create(ONE)
            outcome.append(caught.value.code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            await trio.lowlevel.checkpoint()
            await agent.destroy(ONE)
        assert outcome == [FaultCode.INVALID_STATE]
        await agent.check()


async def test_two_destroys_at_once(host, autojump_clock):
    """One of them does it, both are answered when nothing is left, and the slot is given back once."""
    async with host.agent() as agent:
        await agent.create(ONE)
        answered = []

        async def destroy():
            await agent.destroy(ONE)
            answered.append(host.directories())

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(destroy)
        assert answered == [set()] * 5
        assert host.steps.count("killed") == 1
        await agent.check()
        assert host.slots.log.count(("remove", 1)) == 1


async def test_a_slot_is_not_given_back_twice(host, autojump_clock, monkeypatch):
    """Trap 6: removal that fails after the slot went back does not free it again, when it is another tenant's."""
    async with host.agent() as agent:
        releases = []
        monkeypatch.setattr(agent.slots, "release", lambda slot: releases.append(slot) or True)
        await agent.create(ONE)
        failures = iter([OSError("busy"), OSError("busy")])
        forget = host.state.forget

        def fail_twice(name):
            if failure := next(failures, None):
                raise failure
            forget(name)

        monkeypatch.setattr(host.state, "forget", fail_twice)
        await agent.destroy(ONE)
        assert len(releases) == 1


BUILD_STEPS = ["slot_create", "slot_created", "overlay_create", "overlay_created", "open_tap", "boot", "booted"]


@pytest.mark.parametrize(
    ("step", "occurrence"), [(step, 1) for step in BUILD_STEPS] + [("fsync", number) for number in range(1, 7)]
)
async def test_destroy_during_each_step(host, autojump_clock, step, occurrence):
    """Trap 7: whatever the build is at, a destroy leaves nothing, and tells the creator so."""
    seen = []
    host.slots_ahead = 0  # so that the build waits for its slot to be made
    async with host.agent() as agent, trio.open_nursery() as nursery:

        def on_step(name):
            seen.append(name)
            if name == step and seen.count(step) == occurrence:
                nursery.start_soon(agent.destroy, ONE)

        await wait_all_tasks_blocked()
        host.on_step = on_step
        with suppress(Fault):
            await agent.create(ONE)
        assert seen.count(step) >= occurrence, "the test did not get there"
        host.on_step = lambda name: None
        await agent.destroy(ONE)
        with pytest.raises(Fault) as caught:
            await agent.create(ONE)
        assert caught.value.code == FaultCode.INVALID_STATE
        await agent.check()
        assert host.running() == set()


async def test_destroy_while_it_waits(host, autojump_clock):
    """In the queue for a boot, at a VMM that hangs, at a guest that is silent, at one that does not take its name."""
    for hang in ("queue", "vmm", "guest", "configure"):
        release = trio.Event()

        async def answer(method, body, stream, release=release):
            await release.wait()

        host.guest_options = {"boots": hang != "guest", "answer": answer if hang == "configure" else None}
        host.vms.boot_gate = trio.Event()
        if hang != "vmm":
            host.vms.boot_gate.set()
        async with host.agent(boots=trio.CapacityLimiter(1)) as agent:
            if hang == "queue":
                agent.parts.boots.acquire_on_behalf_of_nowait("somebody")
            sandbox = await agent.manager.create(request(ONE))
            with trio.move_on_after(1):
                await sandbox.started.wait()
            assert agent.statuses() == {ONE: "starting"}
            began = trio.current_time()
            await agent.destroy(ONE)
            assert trio.current_time() == began, "it is given up at once"
            with pytest.raises(Fault, match="destroyed while it started"):
                await sandbox.started.wait()
            await agent.check()
            assert agent.parts.boots.borrowed_tokens == (hang == "queue")


async def test_destroy_during_destroy(host, autojump_clock):
    """The second one, at any moment of the first, waits for the same end."""
    async with host.agent() as agent:
        for number, step in enumerate(["kill", "killed", "overlay_remove", "rmtree", "unlinked", "rmtree_done"]):
            name = sandbox_id(10 + number)
            await agent.create(name)
            async with trio.open_nursery() as nursery:

                def on_step(seen, step=step, name=name, nursery=nursery):
                    if seen == step:
                        nursery.start_soon(agent.destroy, name)

                host.on_step = on_step
                await agent.destroy(name)
                host.on_step = lambda name: None
            await agent.check()
        assert host.steps.count("killed") == 6
