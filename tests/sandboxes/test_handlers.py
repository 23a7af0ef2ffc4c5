"""The agent's side of the wire: forwarding into guests, its limits, and calls that are wrong."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from sandbox_world import create_body, sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.actor.inbox import MAX_WINDOW_BYTES
from agent.sandboxes import gate
from agent.wire import limits
from agent.wire.faults import Fault, FaultCode

ONE, TWO, NOBODY = sandbox_id(1), sandbox_id(2), sandbox_id(99)
BUFFERS = 2 * MAX_WINDOW_BYTES + limits.MAX_DATA_BYTES
"""What may lie between two ends: the window of either connection, and what one task holds in its hands."""


class Guest:
    """Guest methods of the tests, and what they saw."""

    def __init__(self):
        self.sent = 0
        self.received = 0
        self.calls = 0
        self.cancelled = 0
        self.release = trio.Event()
        self.bodies = []

    async def answer(self, method, body, stream):
        if method == "configure":
            return {}
        self.bodies.append((method, body))
        return await getattr(self, body["cmd"])(stream)

    async def echo(self, stream):
        async for channel, data in stream:
            await stream.send(data, channel + 1)
        return {"exit_code": 0}

    async def pour(self, stream):
        while True:
            await stream.send(b"x" * 10_000, 1)
            self.sent += 10_000

    async def hang(self, stream):
        self.calls += 1
        try:
            await self.release.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        return {"exit_code": 0}

    async def drink(self, stream):
        await self.release.wait()
        async for _, data in stream:
            self.received += len(data)
        return {"size": self.received}

    async def refuse(self, stream):
        raise Fault(FaultCode.NOT_FOUND, "no such file", details={"object": "sandbox", "path": "/x"})


@pytest.fixture
def guest(host):
    guest = Guest()
    host.guest_options = {"answer": guest.answer}
    return guest


def stream_of(control_plane, cmd, name=ONE, **options):
    return control_plane.open_stream("exec", {"sandbox_id": name, "cmd": cmd}, **options)


async def read_to_the_end(stream):
    async for _ in stream:
        pass
    return await stream.reply()


async def test_bytes_both_ways(host, guest, autojump_clock):
    """A megabyte in odd pieces goes in and comes back, in order; the guest never sees the sandbox's id."""
    content = bytes(range(256)) * 4096
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        async with stream_of(control_plane, "echo") as stream, trio.open_nursery() as nursery:

            async def send():
                for begin in range(0, len(content), 77_777):
                    await stream.send(content[begin : begin + 77_777])
                await stream.end()

            nursery.start_soon(send)
            received = b""
            async for channel, data in stream:
                assert channel == 1
                received += data
            assert received == content
            assert await stream.reply() == {"exit_code": 0}
        assert guest.bodies == [("exec", {"cmd": "echo"})]


async def test_a_reader_that_stops_stops_the_guest(host, guest, autojump_clock):
    """No more than the credits in between are buffered; reading goes on where it stopped; leaving ends the call."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        async with stream_of(control_plane, "pour") as stream:
            await wait_all_tasks_blocked()
            assert limits.INITIAL_CREDIT <= guest.sent <= BUFFERS
            read = 0
            while read < 2 * BUFFERS:
                read += len((await anext(stream))[1])
            await wait_all_tasks_blocked()
            assert guest.sent >= read
            assert guest.sent - read <= BUFFERS
        await wait_all_tasks_blocked()
        total = guest.sent
        await trio.sleep(60)
        assert guest.sent == total


async def test_a_guest_that_does_not_read_stops_the_sender(host, guest, autojump_clock):
    """The other way round."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        sent = 0
        async with stream_of(control_plane, "drink") as stream, trio.open_nursery() as nursery:

            async def send():
                nonlocal sent
                while sent < 2 * BUFFERS:
                    await stream.send(b"x" * 10_000)
                    sent += 10_000
                await stream.end()

            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            assert limits.INITIAL_CREDIT <= sent <= BUFFERS
            guest.release.set()
            assert await stream.reply() == {"size": sent}


async def test_a_notice_stays_whole(host, autojump_clock):
    """Channel 3 is one map per DATA frame, however little credit there is."""

    async def answer(method, body, stream):
        if method != "configure":
            for _ in range(40):
                await stream.send(b"x" * 30_000, 3)
        return {}

    host.guest_options = {"answer": answer}
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        async with control_plane.open_stream("files.list", {"sandbox_id": ONE, "path": "/"}) as stream:
            await wait_all_tasks_blocked()
            assert {len(data) async for _, data in stream} == {30_000}


async def test_a_cancelled_call_ends_in_the_guest(host, guest, autojump_clock):
    """Cancelled by its caller, its deadline, or a lost connection: the guest is told, its place is free."""
    async with host.agent() as agent:
        await agent.create(ONE)
        for number, how in enumerate(("leave", "deadline", "connection"), start=1):
            async with agent.connection() as control_plane:
                if how == "deadline":
                    with pytest.raises(Fault) as caught:
                        await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "hang"}, timeout=3)
                    assert caught.value.code == FaultCode.DEADLINE_EXCEEDED
                else:
                    async with stream_of(control_plane, "hang"):
                        await wait_all_tasks_blocked()
                        if how == "connection":
                            control_plane.close()
            await trio.sleep(1)
            assert guest.cancelled == number
            assert agent.manager.find(ONE).gate.statistics().borrowed_tokens == 0


@pytest.mark.parametrize("cmd", ["hang", "pour", "echo"])
async def test_a_guest_that_goes_away(host, guest, autojump_clock, cmd):
    """In the middle of a call, whatever it is at: unavailable; the next call works over a new connection."""
    async with host.agent() as agent, agent.connection() as control_plane:
        state = await agent.create(ONE)
        async with stream_of(control_plane, cmd) as stream:
            await wait_all_tasks_blocked()
            host.guests[state.host_ip].hang_up()
            with pytest.raises(Fault, match="its state is unknown") as caught:
                await read_to_the_end(stream)
        assert (caught.value.code, caught.value.retryable) == (FaultCode.UNAVAILABLE, True)
        guest.release.set()
        answer = await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "hang"}, timeout=30)
        assert answer == {"exit_code": 0}


@pytest.mark.parametrize("how", ["destroy", "die"])
async def test_a_sandbox_that_ends_in_the_middle_of_calls(host, guest, autojump_clock, how):
    """Those that run and those that wait for their turn: invalid_state, at once."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        faults = []

        async def call():
            with pytest.raises(Fault) as caught:
                await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "hang"}, timeout=60)
            faults.append((caught.value.code, caught.value.details))

        async with trio.open_nursery() as nursery:
            for _ in range(gate.RUNNING + 5):
                nursery.start_soon(call)
            await wait_all_tasks_blocked()
            began = trio.current_time()
            if how == "destroy":
                await agent.destroy(ONE)
            else:
                host.vms.machine(ONE).die("boom")
        assert trio.current_time() == began
        assert faults == [(FaultCode.INVALID_STATE, {"status": "stopping"})] * (gate.RUNNING + 5)
        await agent.check()


async def test_the_gate(host, guest, autojump_clock):
    """So many run, so many wait, the next is told at once; another sandbox is not concerned."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        await agent.create(TWO)
        answered = []

        async def call():
            answered.append(await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "hang"}, timeout=600))

        async with trio.open_nursery() as nursery:
            for _ in range(gate.RUNNING + gate.WAITING):
                nursery.start_soon(call)
            await wait_all_tasks_blocked()
            assert guest.calls == gate.RUNNING
            figures = agent.manager.find(ONE).gate.statistics()
            assert (figures.borrowed_tokens, figures.tasks_waiting) == (gate.RUNNING, gate.WAITING)
            began = trio.current_time()
            with pytest.raises(Fault, match="32 calls run and 64 wait") as caught:
                await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "hang"}, timeout=60)
            assert (caught.value.code, caught.value.retryable) == (FaultCode.TOO_MANY_PROCESSES, True)
            assert trio.current_time() == began
            async with stream_of(control_plane, "echo", TWO) as stream:
                await stream.end()
                await stream.reply()
            guest.release.set()
        assert len(answered) == gate.RUNNING + gate.WAITING


async def test_waiting_calls_that_are_given_up(host, guest, autojump_clock):
    """They leave the queue, and never reach the guest."""
    async with host.agent() as agent, agent.connection() as control_plane, trio.open_nursery() as nursery:
        await agent.create(ONE)
        call = partial(control_plane.call, "exec", {"sandbox_id": ONE, "cmd": "hang"}, timeout=600)
        for _ in range(gate.RUNNING):
            nursery.start_soon(call)
        await wait_all_tasks_blocked()
        with trio.move_on_after(1):
            await call()
        await wait_all_tasks_blocked()
        assert agent.manager.find(ONE).gate.statistics().tasks_waiting == 0
        guest.release.set()
        await wait_all_tasks_blocked()
        assert guest.calls == gate.RUNNING


async def test_a_guest_cannot_speak_for_the_host(host, guest, autojump_clock):
    """Its faults pass, with its details, but it cannot claim that its sandbox is not here."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        with pytest.raises(Fault, match="no such file") as caught:
            await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "refuse"}, timeout=5)
        assert (caught.value.code, caught.value.details) == (FaultCode.NOT_FOUND, {"path": "/x"})
        with pytest.raises(Fault) as caught:
            await control_plane.call("exec", {"sandbox_id": NOBODY, "cmd": "refuse"}, timeout=5)
        assert (caught.value.code, caught.value.details) == (FaultCode.NOT_FOUND, {"object": "sandbox"})


BAD_CALLS = [
    ("no.such.method", {}, FaultCode.UNKNOWN_METHOD),
    ("configure", {"sandbox_id": ONE}, FaultCode.UNKNOWN_METHOD),
    ("sync", {"sandbox_id": ONE}, FaultCode.UNKNOWN_METHOD),
    ("exec", {}, FaultCode.INVALID_ARGUMENT),
    ("exec", {"sandbox_id": 7}, FaultCode.INVALID_ARGUMENT),
    ("exec", {"sandbox_id": "../../etc"}, FaultCode.INVALID_ARGUMENT),
    ("sandbox.destroy", {"sandbox_id": ONE.upper() + "/"}, FaultCode.INVALID_ARGUMENT),
    ("sandbox.ping", {"sandbox_id": NOBODY}, FaultCode.NOT_FOUND),
    ("host.acknowledge", {"sequence": "x"}, FaultCode.INVALID_ARGUMENT),
    ("sandbox.create", {"sandbox_id": TWO}, FaultCode.INVALID_ARGUMENT),
    ("sandbox.create", create_body(TWO) | {"vcpus": 0}, FaultCode.INVALID_ARGUMENT),
    ("sandbox.create", create_body(TWO) | {"memory_mb": -1}, FaultCode.INVALID_ARGUMENT),
    ("sandbox.create", create_body(TWO) | {"memory_mb": 2**40}, FaultCode.INVALID_ARGUMENT),
    ("sandbox.create", create_body(TWO) | {"hostname": "a b"}, FaultCode.INVALID_ARGUMENT),
    ("sandbox.create", create_body(TWO) | {"template": "../x"}, FaultCode.INVALID_ARGUMENT),
    ("sandbox.create", create_body(TWO) | {"envs": {"a": 1}}, FaultCode.INVALID_ARGUMENT),
]


@pytest.mark.parametrize(("method", "body", "code"), BAD_CALLS)
async def test_bad_calls(host, autojump_clock, method, body, code):
    """Refused with the right code, without having done anything; the connection goes on."""
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        with pytest.raises(Fault) as caught:
            await control_plane.call(method, body, timeout=5)
        assert caught.value.code == code
        assert agent.statuses().keys() == {ONE}
        assert await control_plane.call("sandbox.ping", {"sandbox_id": ONE}, timeout=5) == {}


async def test_calls_before_it_runs(host, autojump_clock):
    """A sandbox that starts takes no calls; the fault has its status."""
    host.guest_options = {"boots": False}
    async with host.agent() as agent, agent.connection() as control_plane, trio.open_nursery() as nursery:
        nursery.start_soon(partial(control_plane.call, "sandbox.create", create_body(ONE), timeout=60))
        await wait_all_tasks_blocked()
        with pytest.raises(Fault) as caught:
            await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "x"}, timeout=5)
        assert (caught.value.code, caught.value.details) == (FaultCode.INVALID_STATE, {"status": "starting"})
        nursery.cancel_scope.cancel()


async def test_activity_resets_the_idle_clock(host, guest, autojump_clock, monkeypatch):
    """A ping, the begin of a call and its end do; listing does not."""
    now = 1000.0
    monkeypatch.setattr("agent.sandboxes.sandbox.time.time", lambda: now)
    async with host.agent() as agent, agent.connection() as control_plane, trio.open_nursery() as nursery:
        await agent.create(ONE)
        sandbox = agent.manager.find(ONE)
        now = 2000.0
        await control_plane.call("host.list", {}, timeout=5)
        assert sandbox.last_active_at == 1000.0
        await control_plane.call("sandbox.ping", {"sandbox_id": ONE}, timeout=5)
        assert sandbox.last_active_at == 2000.0
        now = 3000.0
        nursery.start_soon(partial(control_plane.call, "exec", {"sandbox_id": ONE, "cmd": "hang"}, timeout=600))
        await wait_all_tasks_blocked()
        assert sandbox.last_active_at == 3000.0
        now = 4000.0
        guest.release.set()
        await wait_all_tasks_blocked()
        assert sandbox.last_active_at == 4000.0
