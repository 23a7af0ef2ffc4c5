"""The host's link to a guest daemon: real TCP on loopback for what the kernel does, a fake clock for the pauses."""

from __future__ import annotations

import errno
import socket
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
import trio.testing

from agent.actor.server import ServerPeer
from agent.guest import client
from agent.guest.client import GuestLink
from agent.wire.faults import Fault, FaultCode

LOOPBACK = "127.0.0.1"


async def answer(method, body, stream):
    if method == "hang":
        await trio.sleep_forever()
    return {"method": method}


class Daemon:
    """Guest daemons on one port of loopback, one after the other."""

    def __init__(self):
        self.peers = []
        self.port = 0

    @asynccontextmanager
    async def serve(self):
        listener = trio.socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await listener.bind((LOOPBACK, self.port))
        listener.listen()
        self.port = listener.getsockname()[1]
        async with trio.SocketListener(listener) as accepting, trio.open_nursery() as nursery:
            nursery.start_soon(self._accept, accepting, nursery)
            yield
            nursery.cancel_scope.cancel()

    async def _accept(self, listener, nursery):
        while True:
            peer = ServerPeer(await listener.accept(), answer)
            self.peers.append(peer)
            nursery.start_soon(peer.run)


@asynccontextmanager
async def running(link):
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            yield link
            nursery.cancel_scope.cancel()


async def test_it_connects_again_after_the_guest_hung_up():
    """A daemon that closes its connection, and one that is started anew: calls work again, without being asked."""
    daemon = Daemon()
    async with daemon.serve(), running(GuestLink(LOOPBACK, daemon.port)) as link:
        assert await link.call("one", {}, timeout=20) == {"method": "one"}
        first = await link.wait_connected(trio.current_time() + 20)
        daemon.peers[-1].close()
        await first.closed.wait()
        assert await link.call("two", {}, timeout=20) == {"method": "two"}
        assert len(daemon.peers) == 2
    async with running(GuestLink(LOOPBACK, daemon.port)) as link:
        with pytest.raises(Fault):
            await link.wait_connected(trio.current_time() + 0.2)
        async with daemon.serve():
            assert await link.call("three", {}, timeout=30) == {"method": "three"}


async def test_a_call_in_the_middle():
    """A connection that is lost under a call: unavailable, and whether it was done is unknown."""
    daemon = Daemon()
    async with daemon.serve(), running(GuestLink(LOOPBACK, daemon.port)) as link:
        await link.call("one", {}, timeout=20)
        async with link.open_stream("hang", {}) as stream:
            daemon.peers[-1].close()
            with pytest.raises(Fault) as caught:
                await stream.reply()
        assert (caught.value.code, caught.value.retryable) == (FaultCode.UNAVAILABLE, True)


async def test_cancelled_at_any_moment_it_leaves_no_descriptor():
    """While it dials, before and after HELLO: every socket is closed (a ResourceWarning is an error)."""
    daemon = Daemon()
    async with daemon.serve():
        for steps in range(40):
            link = GuestLink(LOOPBACK, daemon.port)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.run)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            with pytest.raises(Fault):
                await link.wait_connected(trio.current_time())
        with trio.fail_after(20):
            while not all(peer.closed.is_set() for peer in daemon.peers):
                await trio.sleep(0.01)


class Mutable(trio.abc.Stream):
    """A stream that can fall silent: what is sent arrives nowhere, nothing comes."""

    def __init__(self, stream):
        self.mute = False
        self._stream = stream

    async def send_all(self, data):
        if self.mute:
            await trio.lowlevel.checkpoint()
        else:
            await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self):
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes=None):
        data = await self._stream.receive_some(max_bytes)
        if self.mute:
            await trio.sleep_forever()
        return data

    async def aclose(self):
        await self._stream.aclose()


@pytest.mark.parametrize("last", ["settle", "thaw"])
async def test_a_guest_that_stands_still_is_not_given_up(autojump_clock, last):
    """From `settle` to `thaw` its silence says nothing, and its streams live on; afterwards it does."""
    near, far = trio.testing.memory_stream_pair()
    road = Mutable(near)

    async def connect():
        if len(script.times) > 1:
            await trio.sleep_forever()
        return road

    script = Script(connect)
    link = GuestLink("10.11.0.1", connect=script)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ServerPeer(far, answer).run)
        nursery.start_soon(link.run)
        async with link.open_stream("hang", {}) as stream:
            for method in ("settle", last):
                await link.call(method, {}, timeout=5)
            road.mute = True
            outcome = None
            with trio.move_on_after(300):
                with pytest.raises(Fault):
                    await stream.reply()
                outcome = "lost"
            assert outcome == ("lost" if last == "thaw" else None)
        nursery.cancel_scope.cancel()


class Script:
    """A `connect` that does what it is told, and counts."""

    def __init__(self, act):
        self.times = []
        self._act = act

    async def __call__(self, address, port):
        self.times.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        return await self._act()


async def closed_at_once():
    near, far = trio.testing.memory_stream_pair()
    await far.aclose()
    return near


async def refused():
    raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


async def swallowed():
    await trio.sleep_forever()


async def test_a_connection_that_drops_before_hello(autojump_clock):
    """Time after time: nobody is told that it is connected, and the pauses grow to their bound."""
    script = Script(closed_at_once)
    link = GuestLink("10.11.0.1", connect=script)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        with pytest.raises(Fault, match="does not answer"):
            await link.wait_connected(trio.current_time() + 200)
        nursery.cancel_scope.cancel()
    pauses = [after - before for before, after in pairwise(script.times)]
    assert pauses[0] < 0.1, "a first loss is mended at once"
    assert pauses[-1] == pytest.approx(client.RECONNECT.max_delay, rel=0.1)
    assert len(pauses) < 40


async def test_who_waits_through_bad_connections_gets_the_good_one(autojump_clock):
    """A call that began before connections that broke is answered over the first that holds, at once."""

    async def connect():
        if len(script.times) < 4:
            return await closed_at_once()
        near, far = trio.testing.memory_stream_pair()
        nursery.start_soon(ServerPeer(far, answer).run)
        return near

    script = Script(connect)
    link = GuestLink("10.11.0.1", connect=script)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        assert await link.call("one", {}, timeout=60) == {"method": "one"}
        assert trio.current_time() < 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("act", [refused, swallowed])
async def test_a_guest_that_is_not_there(autojump_clock, act):
    """Refused, or no answer at all: often at first, while it may boot, then about once a second; never busy."""
    script = Script(act)
    link = GuestLink("10.11.0.1", connect=script)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        await trio.sleep(4)
        assert len(script.times) >= (20 if act is refused else 6)
        await trio.sleep(600)
        assert len(script.times) < 1500
        before = len(script.times)
        await trio.sleep(100)
        assert len(script.times) - before <= 101
        nursery.cancel_scope.cancel()


async def test_a_good_connection_forgets_the_bad_ones(autojump_clock):
    """After a connection that held, the next loss is mended at once again."""
    ends = []

    async def connect():
        if len(script.times) < 10:
            return await closed_at_once()
        near, far = trio.testing.memory_stream_pair()
        ends.append(far)
        nursery.start_soon(ServerPeer(far, answer).run)
        return near

    script = Script(connect)
    link = GuestLink("10.11.0.1", connect=script)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        while not ends:
            await trio.sleep(1)
        await trio.sleep(client.STABLE + 1)
        lost_at = trio.current_time()
        await ends[0].aclose()
        while len(ends) < 2:
            await trio.sleep(0.01)
        assert trio.current_time() - lost_at < 0.2
        nursery.cancel_scope.cancel()


async def test_waiting_for_a_connection_is_bounded(autojump_clock):
    """By the call's own time-out, and for a long one by ours: nobody waits an hour for a guest that is gone."""
    link = GuestLink("10.11.0.1", connect=Script(refused))
    for seconds, waits in ((3, 3), (3600, client.CONNECT_TIMEOUT)):
        began = trio.current_time()
        with pytest.raises(Fault) as caught:
            await link.call("exec", {}, timeout=seconds)
        assert caught.value.code == FaultCode.UNAVAILABLE
        assert trio.current_time() - began == pytest.approx(waits)
