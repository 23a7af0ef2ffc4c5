"""A guest that breaks the protocol: it costs its own connection, and its own sandbox's calls."""

from __future__ import annotations

import math

import msgspec
import pytest
import trio
import trio.testing
from sandbox_world import sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.guest import client
from agent.guest.client import GuestLink
from agent.wire import limits
from agent.wire.codec import encode
from agent.wire.faults import Fault, FaultCode
from agent.wire.messages import Credit, Data, Goaway, Hello, Open, Ping, Pong, Reply

ONE, TWO = sandbox_id(1), sandbox_id(2)
HELLO = encode(Hello(limits.VERSION, [], limits.INITIAL_CREDIT, 256))
DEEP = encode(Data(1, 0, b"x"))[:4] + b"\x91" * 2000


def prefixed(payload):
    return len(payload).to_bytes(4, "big") + payload


ATTACKS = {
    "nothing": b"",
    "another protocol": b"HTTP/1.1 200 OK\r\n\r\n",
    "a length of nothing": bytes(4),
    "a length beyond all": b"\xff\xff\xff\xff",
    "garbage": HELLO + prefixed(b"\xc1" * 100),
    "two hellos": HELLO + HELLO,
    "another version": encode(Hello(limits.VERSION + 1, [], 0, 1)),
    "an answer nobody asked for": HELLO + encode(Reply(1, {})),
    "bytes nobody asked for": HELLO + encode(Data(1, 0, b"x")),
    "credit nobody asked for": HELLO + encode(Credit(1, 1)),
    "a question": HELLO + encode(Open(1, "host.list", {}, 0)),
    "a pong nobody asked for": HELLO + encode(Pong(1)),
    "many pings": HELLO + encode(Ping(1)) * 1000,
    "a deep body": HELLO + prefixed(msgspec.msgpack.encode([4, 1, {"a": [[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]}])),
    "a flood": HELLO + encode(Data(1, 0, b"x" * 60_000)) * 50,
    "too large an answer": HELLO + (client.MAX_GUEST_FRAME_BYTES + 1).to_bytes(4, "big"),
}


class HostileGuest(GuestLink):
    """Accepts every connection and says one thing on it, then goes on reading (or hangs up)."""

    attack = b""
    attempts = 0
    hang_up = False

    def __init__(self, address):
        super().__init__(address, connect=self.accept)

    async def accept(self, _address, _port):
        await trio.lowlevel.checkpoint()
        near, far = trio.testing.memory_stream_pair()
        type(self).attempts += 1
        if self.attack:
            await far.send_all(self.attack)
        if self.hang_up:
            await far.aclose()
        self.far = far
        return near


@pytest.fixture
def hostile():
    HostileGuest.attack, HostileGuest.attempts, HostileGuest.hang_up = b"", 0, False
    return HostileGuest


@pytest.mark.parametrize("hang_up", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
async def test_attacks(host, autojump_clock, hostile, name, hang_up):
    """Whatever a guest says, its neighbour does not notice; its own calls are told; it can be destroyed.

    And it does not keep us busy: connections that break are made again more and more slowly.
    """
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        await agent.create(TWO)
    hostile.attack, hostile.hang_up = ATTACKS[name], hang_up
    connect = host.connect_guest
    address = host.state.load()[ONE].slot
    host.connect_guest = lambda ip: hostile(ip) if ip.endswith(f".{address}") else connect(ip)
    async with host.agent() as agent, agent.connection() as control_plane:
        with pytest.raises(Fault) as caught:
            await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "x"}, timeout=100)
        assert caught.value.code == FaultCode.UNAVAILABLE
        answer = await control_plane.call("exec", {"sandbox_id": TWO, "cmd": "x"}, timeout=5)
        assert answer["exit_code"] == 0
        hostile.attempts = 0
        await trio.sleep(300)
        assert 1 <= hostile.attempts <= 40
        assert agent.statuses() == {ONE: "running", TWO: "running"}
        await agent.destroy(ONE)
        await agent.check()


async def test_a_goaway(host, autojump_clock, hostile):
    """A guest that takes no new calls: said as it is, not as the host's own draining; bounded in time."""
    async with host.agent() as agent:
        await agent.create(ONE)
    hostile.attack = HELLO + encode(Goaway("bye", "I am busy"))
    host.connect_guest = hostile
    async with host.agent() as agent, agent.connection() as control_plane:
        await wait_all_tasks_blocked()
        with pytest.raises(Fault) as caught:
            await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "x"}, timeout=5)
        assert caught.value.code == FaultCode.UNAVAILABLE


async def test_answers_that_break_rules(host, autojump_clock, hostile):
    """Beyond its credit, after its last frame, with a body that we could not pass on: the call fails, no more."""
    async with host.agent() as agent:
        await agent.create(ONE)
    hostile.attack = HELLO
    links = []
    host.connect_guest = lambda ip: links.append(hostile(ip)) or links[-1]
    replies = {
        "credit": encode(Data(1, 1, b"x" * 65536)) * 5,
        "after": encode(Reply(1, {})) * 2,
        "odd": prefixed(msgspec.msgpack.encode([4, 1, {1: 2}])),
    }
    for reply in replies.values():
        async with host.agent() as agent, agent.connection() as control_plane:
            await wait_all_tasks_blocked()
            async with control_plane.open_stream("exec", {"sandbox_id": ONE, "cmd": "x"}) as stream:
                await wait_all_tasks_blocked()
                await links[-1].far.send_all(reply)
                await wait_all_tasks_blocked()
                with trio.move_on_after(30):
                    try:
                        assert await stream.reply() == {}
                    except Fault as fault:
                        assert fault.code == FaultCode.UNAVAILABLE  # noqa: PT017
            assert agent.statuses() == {ONE: "running"}


async def test_a_body_that_cannot_be_passed_on(host, autojump_clock):
    """The largest answer that the link to the guest takes fits into the link to the control plane."""

    async def answer(method, body, stream):
        return {} if method == "configure" else {"x": "y" * (client.MAX_GUEST_FRAME_BYTES - 100)}

    host.guest_options = {"answer": answer}
    async with host.agent() as agent, agent.connection() as control_plane:
        await agent.create(ONE)
        body = await control_plane.call("processes.list", {"sandbox_id": ONE}, timeout=math.inf)
        assert len(body["x"]) == client.MAX_GUEST_FRAME_BYTES - 100
