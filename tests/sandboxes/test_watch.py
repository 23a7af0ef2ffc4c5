"""host.watch, draining, and the end of everything: purge."""

from __future__ import annotations

import msgspec
import pytest
import trio
from sandbox_world import create_body, sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.sandboxes import purge as purging
from agent.wire import limits
from agent.wire.faults import Fault, FaultCode

ONE, TWO = sandbox_id(1), sandbox_id(2)


async def test_a_watcher_is_told_at_once_and_at_every_change(host, autojump_clock):
    """The first notice says where things stand; then silence until something changes."""
    async with (
        host.agent() as agent,
        agent.connection() as control_plane,
        control_plane.open_stream("host.watch", {}) as watch,
    ):
        channel, data = await anext(watch)
        assert channel == 3
        version = msgspec.msgpack.decode(data)["version"]
        with trio.move_on_after(60) as silence:
            await anext(watch)
        assert silence.cancelled_caught
        await control_plane.call("sandbox.create", create_body(ONE), timeout=30)
        with trio.fail_after(1):
            _, data = await anext(watch)
        assert msgspec.msgpack.decode(data)["version"] > version


async def test_a_watcher_that_does_not_read(host, autojump_clock):
    """It costs its credit and no more, and holds up nobody; when it reads again it soon has the latest."""
    async with (
        host.agent() as agent,
        agent.connection() as stalled,
        agent.connection() as lively,
        stalled.open_stream("host.watch", {}) as watch,
    ):
        agent.manager.version = 2**40  # longer notices use the credit up sooner
        changes = 20_000
        for _ in range(changes):
            agent.manager.changed()
            await wait_all_tasks_blocked()
        await lively.call("sandbox.create", create_body(ONE), timeout=5)
        await lively.call("host.list", {}, timeout=5)
        told = b""
        last = msgspec.msgpack.encode({"version": agent.manager.version})
        while not told.endswith(last):
            _, data = await anext(watch)
            told += data
        assert len(told) <= limits.INITIAL_CREDIT + 2 * len(last) < changes * len(last), "changes melt into one"


async def test_draining(host, autojump_clock):
    """No new sandboxes, a retryable fault says so; those that live are served, destroyed, and watchers go."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        async with control_plane.open_stream("host.watch", {}) as watch:
            await anext(watch)
            agent.manager.drain()
            assert await watch.reply() == {}
        with pytest.raises(Fault) as caught:
            await control_plane.call("sandbox.create", create_body(TWO), timeout=5)
        assert (caught.value.code, caught.value.retryable) == (FaultCode.DRAINING, True)
        again = await control_plane.call("sandbox.create", create_body(ONE), timeout=5)
        assert again["status"] == "running"
        answer = await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "x"}, timeout=5)
        assert answer["exit_code"] == 0
        await control_plane.call("sandbox.destroy", {"sandbox_id": ONE}, timeout=5)
        await agent.check()


async def test_purge(host, autojump_clock, monkeypatch):
    """VMs, hidden ones too, directories, slots and the host's network go; the outbox tells of every sandbox at the
    next start."""
    removed = []
    monkeypatch.setattr(purging, "remove_host_network", removed.append)
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.create(TWO)
        host.vms.machine(TWO).hidden = True  # as a VMM is that its guest has taken over
        host.state.directory(sandbox_id(3)).mkdir()
        (host.state.sandboxes / "lost+found").mkdir()
    host.dead = False
    parts = host.new_agent().parts
    stopped = []

    async def stop_pager():
        assert host.running() == set(), "no VM may wait for a pager that has gone"
        stopped.append(1)

    assert await purging.purge(parts, host.root / "network.json", stop_pager) == 3
    assert host.running() == set()
    assert host.directories() == {"lost+found"}
    assert await host.slots.existing() == set()
    assert stopped == [1]
    assert removed == [host.root / "network.json"]
    assert await purging.purge(parts, host.root / "network.json", stop_pager) == 0
    (host.state.sandboxes / "lost+found").rmdir()
    async with host.agent() as agent:
        assert sorted(agent.told()) == [(sandbox_id(number), "destroyed") for number in (1, 2, 3)]
        await agent.check()
