"""Idle sandboxes are paused: when, when not, and what is told."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio
from sandbox_world import sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.sandboxes import reaper
from agent.vmm.driver import VmDiskFull
from agent.wire.faults import Fault

ONE, TWO = sandbox_id(1), sandbox_id(2)


async def test_after_its_time(host, autojump_clock):
    """Not before, and at the next look; told, durably; the time-out survives pause and resume. 0 is never."""
    async with host.agent() as agent:
        await agent.create(ONE, timeout_sec=60)
        await agent.create(TWO)
        await trio.sleep(59)
        assert agent.statuses() == {ONE: "running", TWO: "running"}
        await trio.sleep(1.5 + reaper.EVERY)
        assert agent.statuses() == {ONE: "paused", TWO: "running"}
        assert agent.told() == [(ONE, "auto_paused")]
        (entry,) = agent.outbox.entries()
        assert "60 s" in entry.reason
        await agent.check()
        await agent.resume(ONE)
        await agent.outbox.acknowledge(entry.sequence)
        await trio.sleep(59)
        assert agent.statuses()[ONE] == "running"
        await trio.sleep(1.5 + reaper.EVERY)
        assert agent.statuses()[ONE] == "paused"
        assert agent.told() == [(ONE, "auto_paused")]
        await trio.sleep(50_000)
        assert agent.statuses()[TWO] == "running"


async def test_activity(host, autojump_clock):
    """A ping, a call, its end; a call under way counts as long as it runs, and so does one that waits."""
    release = trio.Event()

    async def answer(method, body, stream):
        if method == "exec" and body["cmd"] == "hang":
            await release.wait()
        return {}

    host.guest_options = {"answer": answer}
    async with host.agent() as agent, agent.connection() as control_plane, trio.open_nursery() as nursery:
        await agent.create(ONE, timeout_sec=60)
        for _ in range(5):
            await trio.sleep(50)
            await control_plane.call("sandbox.ping", {"sandbox_id": ONE}, timeout=5)
        for _ in range(5):
            await trio.sleep(50)
            await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "x"}, timeout=5)

        async def call():
            await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "hang"}, timeout=6000)

        nursery.start_soon(call)
        await trio.sleep(1000)
        assert agent.statuses() == {ONE: "running"}
        release.set()
        await trio.sleep(59)
        assert agent.statuses() == {ONE: "running"}
        await trio.sleep(5)
        assert agent.statuses() == {ONE: "paused"}


async def test_what_comes_in_between_keeps_it(host, autojump_clock, monkeypatch):
    """Asked to pause, and used before its life gets to it: it is not paused, and nothing is told."""
    monkeypatch.setattr(reaper, "EVERY", 1e9)  # we are the reaper
    async with host.agent() as agent:
        await agent.create(ONE, timeout_sec=60)
        await trio.sleep(61)
        sandbox = agent.manager.find(ONE)
        slot = sandbox.pause_idle()
        sandbox.touch()
        with pytest.raises(Fault, match="not any more"):
            await slot.wait()
        assert agent.statuses() == {ONE: "running"}
        assert agent.told() == []


async def test_a_user_who_pauses_at_the_same_time(host, autojump_clock, monkeypatch):
    """Trap 5: whoever comes first, there is one pause, no error for the user, and nothing that the user did is told
    as the host's own doing."""
    monkeypatch.setattr(reaper, "EVERY", 1e9)  # we are the reaper
    async with host.agent() as agent:
        await agent.create(ONE, timeout_sec=60)
        await trio.sleep(60.5)
        sandbox = agent.manager.find(ONE)
        for first in ("reaper", "user"):
            if first == "reaper":
                sandbox.pause_idle()
                outcome = await sandbox.pause().wait()
            else:
                slot = sandbox.pause()
                sandbox.pause_idle()
                outcome = await slot.wait()
            assert outcome.status == "paused"
            assert agent.told() == []
            await agent.check()
            await agent.resume(ONE)
            await trio.sleep(60.5)


async def test_a_failing_pause(host, autojump_clock):
    """It stays, told once for the whole streak; tried again with growing pauses; then told that it is paused."""
    async with host.agent() as agent:
        await agent.create(ONE, timeout_sec=10)
        attempts = []

        def on_step(name):
            if name == "save_state":
                attempts.append(trio.current_time())
                if len(attempts) < 6:
                    raise VmDiskFull("full")

        host.on_step = on_step
        await trio.sleep(60)
        assert agent.statuses() == {ONE: "running"}
        assert agent.told() == [(ONE, "pause_failed")]
        (entry,) = agent.outbox.entries()
        assert entry.reason == "the host's disk is full; the sandbox runs on"
        await trio.sleep(1000)
        assert agent.statuses() == {ONE: "paused"}
        assert agent.told() == [(ONE, "pause_failed"), (ONE, "auto_paused")]
        gaps = [after - before for before, after in pairwise(attempts)]
        assert gaps == sorted(gaps)
        assert gaps[-1] > 4 * gaps[0]


async def test_killed_between_the_commit_and_the_telling(make_host, autojump_clock):
    """At each step: what is paused by itself is told, at the latest by the next agent, and once the record says so."""
    for point in range(1, 200):
        host = make_host()

        async def begin(agent):
            await agent.create(ONE, timeout_sec=10)

        async def wait(agent):
            await trio.sleep(15)
            await wait_all_tasks_blocked()

        await host.live(begin)
        first = await host.live(wait, crash_at=point)
        host.pager.forget_dead()
        last = await host.live(settle)
        assert last.finished
        if host.state.load()[ONE].phase == "paused":
            assert (ONE, "auto_paused") in last.told(), f"killed at {point}"
        if first.finished:
            break
    assert point > 10


async def settle(agent):
    await wait_all_tasks_blocked()
    await agent.check()


async def test_full_disk_when_it_is_to_be_told(host, autojump_clock, monkeypatch):
    """It is told later: by the next agent at the latest."""
    async with host.agent() as agent:
        await agent.create(ONE, timeout_sec=10)
        append = agent.outbox.append

        async def fail(*arguments):
            raise OSError(28, "full")

        monkeypatch.setattr(agent.outbox, "append", fail)
        await trio.sleep(15)
        assert agent.statuses() == {ONE: "paused"}
        assert agent.told() == []
        monkeypatch.setattr(agent.outbox, "append", append)
    async with host.agent() as agent:
        await wait_all_tasks_blocked()
        assert agent.told() == [(ONE, "auto_paused")]
