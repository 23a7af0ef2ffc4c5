"""Hostile clients on a real connection: a typed close, bounded memory, nothing in the log, and others are served."""

from __future__ import annotations

import gc
import struct
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio
from wsproto.frame_protocol import FrameProtocol, Opcode

from capsule.http.sockets import endpoint, following

HEAD = (
    "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{more}\r\n"
)
MASKED = b"\0\0\0\0"
"""A mask that changes nothing."""


def frame(opcode, payload=b"", *, fin=True, rsv=0, masked=True, size=None):
    size = len(payload) if size is None else size
    first, flag = fin << 7 | rsv << 4 | opcode, masked << 7
    if size <= 125:
        head = struct.pack("!BB", first, flag | size)
    elif size < 65536:
        head = struct.pack("!BBH", first, flag | 126, size)
    else:
        head = struct.pack("!BBQ", first, flag | 127, size)
    return head + (MASKED if masked else b"") + payload


START = frame(Opcode.TEXT, b'{"type":"start","cmd":"x"}')
TEXT, BINARY, MORE, PING, CLOSE = Opcode.TEXT, Opcode.BINARY, Opcode.CONTINUATION, Opcode.PING, Opcode.CLOSE


class Raw:
    """A client that sends what it likes."""

    def __init__(self, stream):
        self.stream = stream
        self._frames = FrameProtocol(client=True, extensions=[])

    async def send(self, data):
        await self.stream.send_all(data)

    async def closed(self):
        """The code of the server's close frame, whatever comes before it."""
        with trio.fail_after(30):
            while True:
                for found in self._frames.received_frames():
                    if found.opcode is Opcode.CLOSE:
                        return int(found.payload[0])
                data = await self.stream.receive_some(65536)
                assert data, "the connection ended without a close frame"
                self._frames.receive_bytes(data)


@asynccontextmanager
async def connected(sockets, route="exec/stream", *, key=True):
    async with await trio.open_tcp_stream("127.0.0.1", sockets.port) as stream:
        more = f"X-API-Key: {sockets.key}\r\n" if key else ""
        await stream.send_all(HEAD.format(path=sockets.path(route), more=more).encode())
        head = b""
        with trio.fail_after(30):
            while not head.endswith(b"\r\n\r\n"):
                head += await stream.receive_some(1)
        assert head.startswith(b"HTTP/1.1 101 "), head
        yield Raw(stream)


async def serves(sockets):
    """Nothing broke: others are served, nobody is left, no error was logged."""
    assert (await sockets.client.get("/health")).status_code == 200
    value = sockets.registry.get_sample_value
    await sockets.until(lambda: (value("capsule_http_streams", {"kind": "execStream"}) or 0) == 0, 20)
    assert all(process.left.is_set() for process in sockets.streams.processes)
    assert not [event for event in sockets.events if event["log_level"] in {"error", "critical"}]


HOSTILE = {
    "not masked": (frame(TEXT, b"{}", masked=False), 1002),
    "reserved bits": (frame(TEXT, b"{}", rsv=2), 1002),
    "compressed": (frame(TEXT, b"{}", rsv=4), 1002),
    "long ping": (frame(PING, b"x" * 126), 1002),
    "ping in pieces": (frame(PING, b"x", fin=False), 1002),
    "2^63": (frame(BINARY, size=2**63), 1002),
    "2^62 and then some": (frame(BINARY, b"x" * 1_100_000, size=2**62), 1009),
    "too large a message": (frame(TEXT, b"x" * (1024 * 1024 + 1)), 1009),
    "too large in fragments": (frame(TEXT, b"x", fin=False) + frame(MORE, b"x" * 65536, fin=False) * 20, 1009),
    "a character across frames, wrong": (frame(TEXT, b'{"\xe2', fin=False) + frame(MORE, b"\x28"), 1007),
    "continuation of nothing": (frame(MORE, b"x"), 1002),
    "a bad close code": (frame(CLOSE, struct.pack("!H", 1006)), 1002),
    "close with half a code": (frame(CLOSE, b"\3"), 1002),
    "close without code": (frame(CLOSE), 1005),
    "binary in json": (frame(BINARY, b"x"), 1003),
    "no JSON": (frame(TEXT, b"{"), 4400),
    "an array": (frame(TEXT, b"[]"), 4400),
    "deep": (frame(TEXT, b'{"type":' + b"[" * 100_000), 4400),
    "unknown type": (frame(TEXT, b'{"type":"exec"}'), 4400),
    "unknown field": (frame(TEXT, b'{"type":"stop","now":true}'), 4400),
    "started twice": (START, 4400),
    "resize of no terminal": (frame(TEXT, b'{"type":"resize","cols":1,"rows":1}'), 4400),
    "auth when known": (frame(TEXT, b'{"type":"auth","token":"x"}'), 4400),
    "stdin without data": (frame(TEXT, b'{"type":"stdin"}'), 4400),
    "stdin with both": (frame(TEXT, b'{"type":"stdin","data":"","data_b64":""}'), 4400),
    "stdin with bad base64": (frame(TEXT, b'{"type":"stdin","data_b64":"?"}'), 4400),
    "input after its end": (
        frame(TEXT, b'{"type":"close_stdin"}') + frame(TEXT, b'{"type":"stdin","data":"x"}'),
        4400,
    ),
    "no such signal": (frame(TEXT, b'{"type":"signal","signal":"SIGNOPE"}'), 4400),
}


@pytest.mark.parametrize("ending", ["close", "hang up"])
@pytest.mark.parametrize(
    ("route", "message"), [("pty", b'{"type":"kill"}'), ("exec/stream", b'{"type":"signal","signal":"SIGKILL"}')]
)
async def test_a_signal_before_the_end_is_delivered(sockets, route, message, ending):
    """Said and closed in one breath. The guest needs a while to take it."""
    async with connected(sockets, route) as raw:
        await raw.send(START)
        with trio.fail_after(30):
            await sockets.streams.started.wait()
        [process] = sockets.streams.processes
        process.control_delay = 0.05
        await raw.send(frame(TEXT, message) + (frame(CLOSE, struct.pack("!H", 1000)) if ending == "close" else b""))
        if ending == "hang up":
            await sockets.until(lambda: process.asked)
        else:
            assert await raw.closed() == 1000
    await sockets.until(lambda: process.signals == [9])
    await serves(sockets)


async def test_a_signal_that_does_not_arrive_holds_nobody(sockets, monkeypatch):
    """A guest that stands still: the client leaves, and a while later so do we."""
    monkeypatch.setattr(following, "LAST_WORD", 0.2)
    async with connected(sockets) as raw:
        await raw.send(START)
        with trio.fail_after(30):
            await sockets.streams.started.wait()
        [process] = sockets.streams.processes
        process.control_delay = 1000
        await raw.send(frame(TEXT, b'{"type":"stop"}'))
        await sockets.until(lambda: process.asked)
    with trio.fail_after(30):
        await process.left.wait()
    assert not process.signals
    await serves(sockets)


async def test_no_team_takes_all_connections(sockets, monkeypatch):
    """Before it has as many as there are it is told so; a place that is left is free."""
    monkeypatch.setattr(endpoint, "TEAM_STREAMS", 2)
    async with connected(sockets) as one:
        async with connected(sockets), connected(sockets) as third:
            assert await third.closed() == 4429
        await one.send(frame(CLOSE))
        assert await one.closed() == 1005
    value = sockets.registry.get_sample_value
    await sockets.until(lambda: value("capsule_http_streams", {"kind": "execStream"}) == 0)  # the second one's, too
    async with connected(sockets) as one, connected(sockets, "pty") as two:
        for raw in (one, two):
            await raw.send(START)
        await sockets.until(lambda: len(sockets.streams.processes) == 2)
    await serves(sockets)


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_may_not_be_sent(sockets, name):
    """To a running process: a close frame that says what it was."""
    data, code = HOSTILE[name]
    async with connected(sockets) as client:
        await client.send(START)
        await sockets.until(lambda: sockets.streams.processes)
        with trio.move_on_after(5):
            with suppress(trio.BrokenResourceError):  # it was closed before all was sent
                await client.send(data)
        assert await client.closed() == code
    await serves(sockets)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(TEXT, b'{"type":"stdin","data":"x"}'), 4400),
        (frame(BINARY, b"x"), 1003),
        (frame(TEXT, b'{"type":"start"}'), 4400),
        (frame(TEXT, b'{"type":"start","cmd":"x","background":true}'), 4400),
        (frame(TEXT, b'{"type":"start","cmd":"x","cwd":"relative"}'), 4400),
        (frame(TEXT, b'{"type":"start","cmd":"a\\u0000b"}'), 4400),
        (frame(TEXT, b'{"type":"start","cmd":"\\ud800 x x x x"}'), 4400),
        (frame(TEXT, b'{"type":"start","cmd":"x","timeout_sec":0}'), 4400),
    ],
)
async def test_a_bad_start(sockets, sent, code):
    """Nothing is started by it."""
    async with connected(sockets) as client:
        await client.send(sent)
        assert await client.closed() == code
    assert not sockets.streams.asked
    await serves(sockets)


class Steps(trio.abc.Instrument):
    """The longest time that one task kept all others waiting, in seconds of this thread's CPU."""

    def __init__(self):
        self.longest, self._since = 0.0, time.thread_time()

    def before_task_step(self, task):
        self._since = time.thread_time()

    def after_task_step(self, task):
        self.longest = max(self.longest, time.thread_time() - self._since)


@pytest.mark.parametrize("piece", [b"", b"x"])
async def test_the_smallest_fragments(sockets, piece):
    """Cost little at a time, hold little, and end."""
    flood = frame(TEXT, b"x", fin=False) + frame(MORE, piece, fin=False) * 20_000
    longest = [await _longest_step(sockets, flood) for _ in range(3)]
    assert min(longest) < 0.05  # a processor that was taken away counts as well, but not each time
    await serves(sockets)


async def _longest_step(sockets, flood):
    """While one client sends that, and until it is closed."""
    steps = Steps()
    gc.disable()  # looking through what other tests have left is a long step, too
    trio.lowlevel.add_instrument(steps)
    try:
        async with connected(sockets) as client:
            with trio.move_on_after(5):
                with suppress(trio.BrokenResourceError):
                    await client.send(flood)
            assert await client.closed() == 1009
    finally:
        trio.lowlevel.remove_instrument(steps)
        gc.enable()
    return steps.longest


async def test_a_flood_of_pings_from_who_does_not_read(sockets):
    """Millions of bytes in, as good as nothing held; whoever else is there is served meanwhile."""
    flood = frame(PING, b"x" * 125) * 500
    async with connected(sockets) as client:
        await client.send(START)
        gc.collect()
        before = len(gc.get_objects())
        with trio.fail_after(30):
            for _ in range(150):
                await client.send(flood)
            assert (await sockets.client.get("/health")).status_code == 200
        gc.collect()
        assert len(gc.get_objects()) - before < 5000
        await client.send(frame(CLOSE, struct.pack("!H", 1000)))
    await serves(sockets)


async def test_a_frame_that_comes_slowly(sockets):
    """Byte by byte is fine; half of one, and then nothing, holds only itself."""
    async with connected(sockets) as client, connected(sockets) as other:
        for byte in START:
            await client.send(bytes((byte,)))
            await trio.lowlevel.checkpoint()
        await sockets.until(lambda: sockets.streams.processes)
        await other.send(frame(TEXT, b'{"type"', size=100_000))
        await sockets.streams.processes[0].say(b"hi")
    await serves(sockets)


async def test_a_thousand_opened_and_abandoned(sockets):
    """Half of them started something; all are gone when their clients are."""
    async with AsyncExitStack() as stack:
        clients = []
        for number in range(1000):
            client = await stack.enter_async_context(connected(sockets, key=number % 2 == 0))
            clients.append(client)
            if number % 4 == 0:
                await client.send(START)
        value = sockets.registry.get_sample_value
        assert value("capsule_http_streams", {"kind": "execStream"}) > 500
        assert (await sockets.client.get("/health")).status_code == 200
        for client in clients:
            client.stream.socket.close()
        await sockets.until(lambda: len(sockets.streams.processes) == 250, 20)
    await serves(sockets)
