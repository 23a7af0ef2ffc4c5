"""Connections that end: lost, silent, hostile, draining, not reading; whoever waits on one is told."""

from __future__ import annotations

import errno
from functools import partial

import pytest
import trio
from trio.testing import lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from agent.actor import connection
from agent.actor.peer import OpenerPeer
from agent.actor.server import ServerPeer
from agent.wire import limits
from agent.wire.codec import encode
from agent.wire.faults import Fault, FaultCode
from agent.wire.link import Link, Role
from agent.wire.messages import Data, End, Goaway, Hello, Open, Ping, Reply

HELLO = encode(Hello(limits.VERSION, [], limits.INITIAL_CREDIT, limits.MAX_STREAMS))


async def echo(method, body, stream):
    async for channel, data in stream:
        await stream.send(data, channel=channel)
    return body


async def wait_for_ever(method, body, stream):
    await trio.sleep_forever()


async def expect(code, call):
    with pytest.raises(Fault) as caught:
        await call()
    assert caught.value.code == code
    assert caught.value.retryable
    return caught.value


@pytest.mark.parametrize("how", ["server closes", "opener closes", "opener is cancelled", "server's bytes are broken"])
async def test_a_lost_connection_fails_everybody_who_waits(joined, how):
    """Calls, senders without credit, readers: all get `unavailable`, retryable, at once; and so does a late caller."""
    failed = 0
    near, far = lockstep_stream_pair()

    async with trio.open_nursery() as nursery, joined(wait_for_ever, (near, far)) as (opener, server):

        async def call() -> None:
            await expect(FaultCode.UNAVAILABLE, lambda: opener.call("m", {}, timeout=60))

        async def pour() -> None:
            async with opener.open_stream("m", {}) as stream:
                await expect(FaultCode.UNAVAILABLE, lambda: stream.send(b"x" * limits.INITIAL_CREDIT * 2))

        async def read() -> None:
            async with opener.open_stream("m", {}) as stream:
                assert [chunk async for chunk in stream] == []
                await expect(FaultCode.UNAVAILABLE, stream.reply)

        async def counted(waiter) -> None:
            nonlocal failed
            await waiter()
            failed += 1

        for waiter in (call, pour, read) * 5:
            nursery.start_soon(counted, waiter)
        await wait_all_tasks_blocked()
        assert failed == 0
        match how:
            case "server closes":
                server.close()
            case "opener closes":
                opener.close()
            case "opener is cancelled":
                opener._scope.cancel()
            case _:
                server.link._out.put_control(bytearray(b"\xff" * 8))
                server._flush()
        with trio.fail_after(5):
            await opener.closed.wait()
            await server.closed.wait()
        await wait_all_tasks_blocked()
        assert failed == 15
        late = await expect(FaultCode.UNAVAILABLE, lambda: opener.call("m", {}, timeout=60))
        assert opener.reason in late.message
        assert opener.reason


async def test_a_handler_is_stopped_when_the_opener_is_gone(joined):
    """Handlers end with their connection, wherever they wait."""
    stopped = []

    async def handler(method, body, stream):
        try:
            match method:
                case "read":
                    await anext(stream)
                case "send":
                    await stream.send(b"x" * limits.INITIAL_CREDIT * 2)
                case _:
                    await trio.sleep_forever()
        finally:
            stopped.append(method)

    near, far = memory_stream_pair()
    async with joined(handler, (near, far)) as (opener, server), trio.open_nursery() as nursery:
        for method in ("read", "send", "sleep"):
            nursery.start_soon(_wait_for_loss, opener, method)
        await wait_all_tasks_blocked()
        assert stopped == []
        await near.aclose()
        with trio.fail_after(5):
            await server.closed.wait()
    assert sorted(stopped) == ["read", "send", "sleep"]


async def _wait_for_loss(opener, method):
    async with opener.open_stream(method, {}) as stream:
        await expect(FaultCode.UNAVAILABLE, stream.reply)


async def _ignore_fault(call):
    with pytest.raises(Fault):
        await call()


async def test_a_peer_that_says_nothing_is_dropped(autojump_clock):
    """HELLO_TIMEOUT after connecting, to the second; whoever started it is told with a Fault."""
    near, _far = memory_stream_pair()
    peer = OpenerPeer(near)
    async with trio.open_nursery() as nursery:
        with pytest.raises(Fault, match="silent"):
            await nursery.start(peer.run)
    assert trio.current_time() == pytest.approx(limits.HELLO_TIMEOUT)


@pytest.mark.parametrize("garbage", [b"\x00\x00\x00\x00", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b""])
async def test_a_peer_of_another_protocol_is_dropped(garbage):
    """`run` returns with a reason; it does not raise, for nobody here made a mistake."""
    near, far = memory_stream_pair()
    await far.send_all(garbage)
    await far.send_eof()
    peer = ServerPeer(near, echo)
    with trio.fail_after(5):
        await peer.run()
    assert peer.closed.is_set()
    assert ("closed the connection" if garbage == b"" else "") in peer.reason
    with pytest.raises(trio.ClosedResourceError):
        await near.send_all(b"x")


async def test_a_peer_that_falls_silent_is_dropped(autojump_clock):
    """A PING after PING_INTERVAL, the end PING_TIMEOUT later."""
    near, far = memory_stream_pair()
    await far.send_all(HELLO)
    peer = OpenerPeer(near)
    async with trio.open_nursery() as nursery:
        await nursery.start(peer.run)
        began = trio.current_time()
        await expect(FaultCode.UNAVAILABLE, lambda: peer.call("m", {}, timeout=600))
        assert trio.current_time() - began == pytest.approx(limits.PING_INTERVAL + limits.PING_TIMEOUT)
    assert "silent" in peer.reason
    assert (await far.receive_some()).endswith(encode(Ping(1)))


async def test_live_peers_keep_each_other(joined, autojump_clock):
    """An hour without a call: PINGs are answered, about every PING_INTERVAL, and the connection is there afterwards."""
    async with joined(echo) as (opener, server):
        await trio.sleep(3600)
        assert not opener.closed.is_set()
        assert not server.closed.is_set()
        assert opener.link._ping_nonce + server.link._ping_nonce >= 0.45 * 3600 / limits.PING_INTERVAL
        assert await opener.call("m", {"k": 1}, timeout=5) == {"k": 1}


async def test_a_peer_that_only_answers_is_asked_every_interval(autojump_clock):
    """A PONG starts the next interval: the following PING does not wait for the time-out of the one before."""
    near, far = memory_stream_pair()
    link = Link(Role.SERVER, now=0.0)
    peer = OpenerPeer(near)

    async def answer() -> None:
        while data := await far.receive_some():
            link.receive_data(data, 0.0)
            await far.send_all(link.data_to_send())

    async with trio.open_nursery() as nursery:
        await far.send_all(link.data_to_send())
        await nursery.start(peer.run)
        nursery.start_soon(answer)
        await trio.sleep(10.5 * limits.PING_INTERVAL)
        assert peer.link._ping_nonce == 10
        peer.close()


class NeverRead(trio.abc.Stream):
    """A stream whose far end has said HELLO and takes nothing: what is sent waits for ever."""

    def __init__(self) -> None:
        self.hello = bytes(HELLO)
        self.stuck = 0

    async def send_all(self, data):
        self.stuck = len(data)
        await trio.sleep_forever()

    async def wait_send_all_might_not_block(self):
        await trio.sleep_forever()

    async def receive_some(self, max_bytes=None):
        await trio.lowlevel.checkpoint()
        hello, self.hello = self.hello, b""
        if not hello:
            await trio.sleep_forever()
        return hello

    async def aclose(self):
        await trio.lowlevel.checkpoint()


async def test_callers_wait_while_the_peer_does_not_read():
    """Nobody reads: large requests queue up to the mark for all and one frame, the rest wait."""
    stream = NeverRead()
    peer = OpenerPeer(stream)
    async with trio.open_nursery() as nursery:
        await nursery.start(peer.run)
        async with trio.open_nursery() as callers:
            for _ in range(50):
                callers.start_soon(_ignore_fault, partial(peer.call, "m", {"k": b"x" * 100_000}, timeout=60))
            await wait_all_tasks_blocked()
            assert peer.link.open_streams() < 45
            assert peer.link.bytes_to_send <= connection.CROWD_BYTES + 100_100
            peer.close()


async def test_a_peer_that_does_not_read_is_dropped_at_the_limit():
    """Small frames are never held back; when they have piled up to OUTPUT_LIMIT_BYTES the peer is given up."""
    peer = OpenerPeer(NeverRead())
    assert connection.HIGH_WATER_BYTES + limits.MAX_FRAME_BYTES < connection.OUTPUT_LIMIT_BYTES
    async with trio.open_nursery() as nursery:
        await nursery.start(peer.run)
        await wait_all_tasks_blocked()
        chunk = 4000
        while peer.link.bytes_to_send + chunk + 100 < connection.OUTPUT_LIMIT_BYTES:
            peer.link.goaway("c", "x" * chunk)
            peer._flush()
            await trio.lowlevel.checkpoint()
            assert not peer._scope.cancel_called
        for _ in range(2):
            peer.link.goaway("c", "x" * chunk)
            peer._flush()
        with trio.fail_after(5):
            await peer.closed.wait()
    assert peer.reason == "the peer does not read"


async def test_what_a_hostile_opener_sends_ends_its_connection_only():
    """Valid work, then a broken rule: the handler is stopped, `run` returns, the listener's nursery is unharmed."""
    near, far = memory_stream_pair()
    server = ServerPeer(near, wait_for_ever)
    async with trio.open_nursery() as nursery:
        await far.send_all(HELLO + encode(Open(1, "m", {}, 0)))
        await nursery.start(server.run)
        await far.send_all(encode(End(1)) + encode(Data(1, 0, b"x")))
        with trio.fail_after(5):
            await server.closed.wait()
    assert "protocol broken by the peer" in server.reason


async def test_a_hostile_servers_small_chunks_cost_little():
    """A quarter of the credit in chunks of one byte, on two channels, while nobody reads: about four bytes for each."""
    near, far = memory_stream_pair()
    await far.send_all(HELLO)
    peer = OpenerPeer(near)
    async with trio.open_nursery() as nursery:
        await nursery.start(peer.run)
        async with peer.open_stream("m", {}) as stream:
            pair = bytes(encode(Data(1, 1, b"a")) + encode(Data(1, 2, b"b")))
            for _ in range(limits.INITIAL_CREDIT // 4 // 2048):
                await far.send_all(pair * 1024)
                await wait_all_tasks_blocked()
            assert peer.link._streams[1].receive_credit == limits.INITIAL_CREDIT * 3 // 4
            assert sum(len(chunk) for chunk in stream.inbox._chunks) == limits.INITIAL_CREDIT
            assert len(stream.inbox._chunks) <= 4
            assert [await anext(stream) for _ in range(3)] == [(1, b"a"), (2, b"b"), (1, b"a")]
        peer.close()


async def test_an_opener_takes_only_frames_of_the_size_it_was_given():
    """`max_frame_bytes` of a peer that is trusted less."""
    near, far = memory_stream_pair()
    await far.send_all(HELLO)
    peer = OpenerPeer(near, max_frame_bytes=1000)
    async with trio.open_nursery() as nursery:
        await nursery.start(peer.run)
        async with trio.open_nursery() as callers:
            callers.start_soon(expect, FaultCode.UNAVAILABLE, lambda: peer.call("m", {}, timeout=5))
            await wait_all_tasks_blocked()
            await far.send_all(encode(Reply(1, {"k": "x" * 1000})))
    assert "1000 are allowed" in peer.reason


async def test_drain_lets_work_finish_and_takes_no_more(joined):
    """Streams that are open go on; the opener opens no more; `drain` returns when the last answer was written."""
    release, drained = trio.Event(), trio.Event()

    async def handler(method, body, stream):
        await release.wait()
        return {"n": 1}

    async with joined(handler) as (opener, server), trio.open_nursery() as nursery:

        async def first() -> None:
            assert await opener.call("m", {}, timeout=5) == {"n": 1}

        async def drain() -> None:
            await server.drain("stopping")
            assert server.link.bytes_to_send == 0
            drained.set()

        nursery.start_soon(first)
        await wait_all_tasks_blocked()
        nursery.start_soon(drain)
        await wait_all_tasks_blocked()
        assert not drained.is_set()
        await expect(FaultCode.DRAINING, lambda: opener.call("m", {}, timeout=5))
        release.set()
        with trio.fail_after(5):
            await drained.wait()


async def test_a_request_that_crosses_the_goaway_is_told():
    """OPEN was on its way: FAULT `draining`, and the handler does not run."""
    ran = []

    async def handler(method, body, stream):
        ran.append(method)
        return {}

    near, far = memory_stream_pair()
    server = ServerPeer(near, handler)
    async with trio.open_nursery() as nursery:
        await far.send_all(HELLO)
        await nursery.start(server.run)
        await server.drain("stopping")
        await far.send_all(encode(Open(1, "m", {}, 0)))
        await wait_all_tasks_blocked()
        data = bytes(await far.receive_some())
        server.close()
    assert encode(Goaway("draining", "stopping")) in data
    assert b"draining" in data.partition(b"stopping")[2]
    assert ran == []


async def test_drain_of_a_lost_connection_returns(joined):
    """Nobody is left to wait for."""
    async with joined(wait_for_ever) as (opener, server), trio.open_nursery() as nursery:
        nursery.start_soon(_ignore_fault, partial(opener.call, "m", {}, timeout=60))
        await wait_all_tasks_blocked()
        nursery.start_soon(server.drain, "stopping")
        await wait_all_tasks_blocked()
        opener.close()
        with trio.fail_after(5):
            await server.closed.wait()


@pytest.mark.parametrize("outside", [False, True])
async def test_a_request_that_arrives_as_the_connection_ends(outside):
    """OPEN in the same tick as the end, in either order (Trio shuffles): no crash of whoever runs the connection."""
    for _ in range(60):
        near, far = memory_stream_pair()
        await far.send_all(HELLO)
        server = ServerPeer(near, echo)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            await wait_all_tasks_blocked()
            near.receive_stream.put_data(bytes(encode(Open(1, "m", {}, 0))))
            if outside:
                nursery.cancel_scope.cancel()
            else:
                server.close()
        assert server.closed.is_set()


class BreaksOn(trio.abc.Stream):
    """A stream whose `operation` fails after HELLO as sockets do."""

    def __init__(self, operation: str, error: Exception) -> None:
        self.operation, self.error, self.hello = operation, error, bytes(HELLO)

    async def send_all(self, data):
        await trio.lowlevel.checkpoint()
        if self.operation == "send":
            raise self.error

    async def wait_send_all_might_not_block(self):
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes=None):
        await trio.lowlevel.checkpoint()
        hello, self.hello = self.hello, b""
        if hello:
            return hello
        if self.operation == "receive":
            raise self.error
        return await trio.sleep_forever()

    async def aclose(self):
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("operation", ["send", "receive"])
@pytest.mark.parametrize("error", [trio.BrokenResourceError(str(errno.ECONNRESET)), trio.ClosedResourceError("closed")])
async def test_a_stream_that_breaks(operation, error):
    """Either direction: the connection ends with the reason, nothing is raised."""
    peer = OpenerPeer(BreaksOn(operation, error))
    with trio.fail_after(5):
        await peer.run()
    assert str(error) in peer.reason


async def test_closing_before_running():
    """`run` then ends at once."""
    near, _far = memory_stream_pair()
    peer = OpenerPeer(near)
    peer.close("changed our mind")
    with trio.fail_after(5):
        await peer.run()
    assert peer.reason == "changed our mind"


async def test_calls_before_the_connection_is_ready():
    """`unavailable`, not a crash."""
    near, _far = memory_stream_pair()
    await expect(FaultCode.UNAVAILABLE, lambda: OpenerPeer(near).call("m", {}, timeout=1))
