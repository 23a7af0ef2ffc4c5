"""Live calls into guests: places of their own, activity, and how each comes to its end; over the real guest link."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from sandbox_world import sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.guest.fake_processes import FakeProcesses
from agent.guest.fake_programs import RAW_CAT
from agent.sandboxes import gate
from agent.sandboxes.gate import Gate, Lane, lane_of
from agent.wire.faults import Fault, FaultCode

ONE = sandbox_id(1)
SIZE = {"cols": 80, "rows": 24}


@asynccontextmanager
async def live(control_plane, method="exec", **body):
    """A live call whose first notice has come: (stream, notice)."""
    async with control_plane.open_stream(method, {"sandbox_id": ONE, "live": True, **body}) as stream:
        channel, data = await anext(stream)
        assert channel == 3
        yield stream, msgspec.msgpack.decode(data)


async def ask(control_plane, method, **body):
    return await control_plane.call(method, {"sandbox_id": ONE, **body}, timeout=60)


async def end_of(stream):
    """The fault that it ends with."""
    async for _ in stream:
        pass
    with pytest.raises(Fault) as caught:
        await stream.reply()
    return caught.value


@pytest.fixture
def processes(host, nursery):
    """The processes of the host's guests: they outlive the agent, as a VM does."""
    table = FakeProcesses(nursery)
    host.guest_options = {"processes": table}
    return table


async def test_live_calls_have_places_of_their_own(host, processes, autojump_clock, monkeypatch):
    """All short ones taken: a live one starts. All live ones taken: the next is told so at once, a short one runs, a
    signal gets through either way; a place that is left is free."""
    monkeypatch.setattr(Gate.__init__, "__defaults__", (gate.RUNNING, gate.WAITING, 20))
    async with (
        host.agent() as agent,
        agent.connection() as control_plane,
        trio.open_nursery() as nursery,
        AsyncExitStack() as streams,
    ):
        await agent.create(ONE)
        for _ in range(gate.RUNNING + gate.WAITING):
            nursery.start_soon(partial(ask, control_plane, "exec", cmd="sleep 1000"))
        await wait_all_tasks_blocked()
        for _ in range(20):
            await streams.enter_async_context(live(control_plane, cmd="cat", stdin=True))
        began = trio.current_time()
        for method, body in (("exec", {"cmd": "cat", "live": True}), ("processes.attach", {"process": 1})):
            with pytest.raises(Fault, match="20 streams are open") as caught:
                await ask(control_plane, method, **body)
            assert (caught.value.code, caught.value.retryable) == (FaultCode.TOO_MANY_PROCESSES, True)
        assert trio.current_time() == began
        listed = (await ask(control_plane, "processes.list"))["processes"]
        assert len(listed) == gate.RUNNING + 20
        for process in listed[: gate.RUNNING]:
            await ask(control_plane, "processes.signal", process=process["pid"], signal=9)
        await wait_all_tasks_blocked()
        assert agent.manager.find(ONE).gate.statistics().tasks_waiting == gate.WAITING - gate.RUNNING
        await streams.aclose()
        await wait_all_tasks_blocked()
        assert agent.manager.find(ONE).gate.statistics(Lane.LIVE).borrowed_tokens == 0
        async with live(control_plane, cmd="cat"):
            pass
        nursery.cancel_scope.cancel()


def test_lanes():
    """Which call goes where; nobody can have a signal wait with the streams."""
    assert lane_of("exec", live=False) is Lane.SHORT
    assert lane_of("exec", live=True) is lane_of("processes.attach", live=False) is Lane.LIVE
    assert lane_of("files.watch", live=False) is lane_of("files.read", live=True) is Lane.LIVE
    for method in ("processes.signal", "processes.resize", "processes.list"):
        assert lane_of(method, live=True) is Lane.STEERING


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(list(Lane)), st.booleans(), st.integers(0, 30)), max_size=60))
def test_the_lanes_of_a_gate(steps):
    """Any coming and going: so many run in each lane, so many wait, the rest is refused; no lane feels another; busy
    as long as anybody is there."""

    async def check():
        one = Gate(running=2, waiting=3, live=4)
        room = {Lane.SHORT: (2, 3), Lane.LIVE: (4, 0), Lane.STEERING: (gate.STEERING, gate.STEERING_WAITING)}
        inside = {lane: [] for lane in Lane}

        async def hold(lane, scope, outcome):
            with scope:
                try:
                    async with one.enter(lane):
                        await trio.sleep_forever()
                except Fault:
                    outcome.append("refused")

        async with trio.open_nursery() as nursery:
            for lane, comes, which in steps:
                if comes:
                    scope, outcome = trio.CancelScope(), []
                    nursery.start_soon(hold, lane, scope, outcome)
                    await wait_all_tasks_blocked()
                    full = len(inside[lane]) >= sum(room[lane])
                    assert bool(outcome) == full
                    if not full:
                        inside[lane].append(scope)
                elif inside[lane]:
                    inside[lane].pop(which % len(inside[lane])).cancel()
                    await wait_all_tasks_blocked()
                for each, (running, _) in room.items():
                    figures = one.statistics(each)
                    assert figures.borrowed_tokens == min(len(inside[each]), running)
                    assert figures.tasks_waiting == max(0, len(inside[each]) - running)
                assert one.busy() == any(inside.values())
            nursery.cancel_scope.cancel()

    trio.run(check)


async def test_all_sandboxes_together_leave_room_for_the_rest(host, processes, autojump_clock, monkeypatch):
    """As many streams as a host takes: the next is told `busy`, creates and signals go on."""
    monkeypatch.setattr(gate, "LIVE_ROOM", 6)
    async with host.agent() as agent, agent.connection() as control_plane, AsyncExitStack() as streams:
        await agent.create(ONE)
        for _ in range(3):
            await streams.enter_async_context(live(control_plane, cmd="cat", stdin=True))
        with pytest.raises(Fault) as caught:
            await ask(control_plane, "exec", cmd="cat", live=True)
        assert caught.value.code == FaultCode.BUSY
        await ask(control_plane, "exec", cmd="true")
        await ask(control_plane, "processes.list")
        await agent.create(sandbox_id(2))


async def test_one_sandbox_leaves_places_to_the_next(host, processes, autojump_clock, monkeypatch):
    """However many streams one tenant opens, in however many sandboxes, another one's console opens."""
    monkeypatch.setattr(gate, "LIVE_ROOM", 16)
    async with host.agent() as agent, agent.connection() as control_plane, AsyncExitStack() as streams:
        for greedy, share in ((ONE, 8), (sandbox_id(2), 4), (sandbox_id(3), 2)):
            await agent.create(greedy)
            for _ in range(share):
                await streams.enter_async_context(live(control_plane, sandbox_id=greedy, cmd="cat", stdin=True))
            with pytest.raises(Fault) as caught:
                await ask(control_plane, "exec", sandbox_id=greedy, cmd="cat", live=True)
            assert caught.value.code == FaultCode.BUSY
        await agent.create(sandbox_id(4))
        await streams.enter_async_context(live(control_plane, sandbox_id=sandbox_id(4), cmd="cat", stdin=True))


async def test_an_open_stream_keeps_a_sandbox_awake(host, processes, autojump_clock):
    """However quiet, and an observer's, too; when the last one has gone, the time-out begins."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE, timeout_sec=30)
        async with live(control_plane, pty=SIZE, tag="t") as (_, said):
            await trio.sleep(600)
            assert agent.statuses() == {ONE: "running"}
        async with live(control_plane, "processes.attach", process=said["pid"], observe=True):
            await trio.sleep(600)
            assert agent.statuses() == {ONE: "running"}
        await trio.sleep(25)
        assert agent.statuses() == {ONE: "running"}
        await trio.sleep(15)
        assert agent.statuses() == {ONE: "paused"}


async def test_bytes_touch_the_clock(host, processes, autojump_clock, monkeypatch):
    """What is typed and what is printed is activity, as of its moment."""
    now = 1000.0
    monkeypatch.setattr("agent.sandboxes.sandbox.time.time", lambda: now)
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        async with live(control_plane, cmd="cat", stdin=True) as (stream, _):
            now = 2000.0
            await wait_all_tasks_blocked()
            assert agent.manager.find(ONE).last_active_at == 1000.0
            await stream.send(b"x")
            await anext(stream)
            assert agent.manager.find(ONE).last_active_at == 2000.0


@pytest.mark.parametrize("how", ["pause", "destroy", "die"])
async def test_a_sandbox_that_goes_ends_its_streams(host, processes, autojump_clock, how):
    """At once, quiet ones and those in full flow that nobody reads, with the reason; no pause waits for them."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        async with (
            live(control_plane, pty=SIZE, tag="quiet") as (quiet, _),
            live(control_plane, cmd="yes", tag="flood") as (flood, _),
        ):
            await wait_all_tasks_blocked()
            began = trio.current_time()
            if how == "pause":
                await agent.pause(ONE)
            elif how == "destroy":
                await agent.destroy(ONE)
            else:
                host.vms.machine(ONE).die("boom")
            for stream in (quiet, flood):
                fault = await end_of(stream)
                assert fault.code == FaultCode.INVALID_STATE
                assert ("paused" if how == "pause" else "stopped") in fault.message
            assert trio.current_time() - began < 1
        await agent.check()


async def test_a_terminal_outlives_a_pause(host, processes, autojump_clock):
    """Paused in the middle, resumed: its shell is still there, with what it had printed."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        async with live(control_plane, cmd=RAW_CAT, pty=SIZE, tag="t") as (stream, _):
            await stream.send(b"one")
            await wait_all_tasks_blocked()
            await agent.pause(ONE)
        await agent.resume(ONE)
        async with live(control_plane, "processes.attach", process="t") as (stream, said):
            assert (said["offset"], said["skipped"]) == (0, 0)
            assert (await anext(stream))[1] + (await anext(stream))[1] == b"ready\none"
            await stream.send(b"two")
            assert (await anext(stream))[1] == b"two"


async def test_a_pause_that_fails_ends_nothing(host, processes, autojump_clock):
    """However long it took: the streams go on where they were."""
    async with host.agent() as agent, agent.connection() as control_plane, trio.open_nursery() as nursery:
        await agent.create(ONE)
        async with live(control_plane, cmd="cat", stdin=True) as (stream, _):
            going_on = host.vms.hold("save_state")
            host.vms.fail_next("save_state", "no")

            async def pause():
                with pytest.raises(Fault):
                    await agent.pause(ONE)

            nursery.start_soon(pause)
            await trio.sleep(300)
            assert agent.statuses() == {ONE: "pausing"}
            going_on.set()
            await trio.sleep(30)
            assert agent.statuses() == {ONE: "running"}
            await stream.send(b"still here")
            assert await anext(stream) == (1, b"still here")


async def test_the_guest_hangs_up(host, processes, autojump_clock):
    """Unavailable; a detached process is there again over the next connection."""
    async with host.agent() as agent, agent.connection() as control_plane:
        state = await agent.create(ONE)
        async with live(control_plane, pty=SIZE, tag="t") as (stream, _):
            host.guests[state.host_ip].hang_up()
            fault = await end_of(stream)
            assert (fault.code, fault.retryable) == (FaultCode.UNAVAILABLE, True)
        async with live(control_plane, "processes.attach", process="t", offset=0) as (_, said):
            assert said["pty"]


async def test_the_agent_stops(host, processes, autojump_clock):
    """A drain does not wait for live calls, which end with a reason; the next agent finds what is detached."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        async with live(control_plane, pty=SIZE, tag="t") as (stream, _), live(control_plane, cmd="cat", stdin=True):
            began = trio.current_time()
            (server,) = agent.servers
            await server.drain("the agent stops")
            assert trio.current_time() - began < 1
            fault = await end_of(stream)
            assert (fault.code, fault.retryable) == (FaultCode.UNAVAILABLE, True)
            assert "agent" in fault.message
    async with host.agent() as agent, agent.connection() as control_plane:
        async with live(control_plane, "processes.attach", process="t"):
            pass
        assert [process.tag for process in processes.living()] == ["t"], "the other one went with its stream"


async def test_a_client_that_leaves(host, processes, autojump_clock):
    """Its process is killed, its place is free; with the connection, too."""
    async with host.agent() as agent:
        await agent.create(ONE)
        for how in ("leave", "connection"):
            async with agent.connection() as control_plane, live(control_plane, cmd="sleep 1000"):
                if how == "connection":
                    control_plane.close()
            await trio.sleep(1)
            assert processes.living() == []
            assert not agent.manager.find(ONE).gate.busy()
