"""What happens to a WebSocket while time goes by: the clock is played, the network is memory."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import lockstep_stream_pair, memory_stream_pair
from werkzeug.datastructures import Headers
from wsproto.frame_protocol import FrameProtocol, Opcode

from capsule import errors
from capsule.http.sockets.handshake import UpgradeRequest
from capsule.http.sockets.websocket import WebSocket

HANDSHAKE = {
    "Host": "x",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


class Wire:
    """The server's end. `unread` and `quiet` are what the kernel would say."""

    def __init__(self, stream):
        self._stream = stream
        self.patience = None
        self.unread = lambda: 0
        self.quiet = 0.0
        self.cuts = 0

    async def send_all(self, data):
        with trio.move_on_after(30 if self.patience is None else self.patience) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            self.cut()
            raise trio.BrokenResourceError("the client does not read")

    async def receive_some(self, max_bytes=None):
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self):
        await self._stream.send_eof()

    def cut(self):
        self.cuts += 1
        self._stream.send_stream.close()
        self._stream.receive_stream.close()

    def unsent(self):
        return self.unread()

    def silence(self):
        return self.quiet

    def hung_up(self):
        return False


class Client:
    """The other end, frame by frame; it answers nothing by itself."""

    def __init__(self, stream, wire):
        self.stream = stream
        self.wire = wire
        self._frames = FrameProtocol(client=True, extensions=[])
        self._seen = []

    async def frame(self):
        """The server's next frame: opcode and payload; EOFError at the end."""
        while True:
            for found in self._frames.received_frames():
                return found.opcode, found.payload
            data = await self.stream.receive_some(65536)
            if not data:
                raise EOFError
            self._frames.receive_bytes(data)

    async def text(self, data):
        await self.stream.send_all(bytes(self._frames.send_data(data)))

    async def pong(self):
        await self.stream.send_all(bytes(self._frames.pong()))

    async def ping(self, payload):
        await self.stream.send_all(bytes(self._frames.ping(payload)))

    async def close(self, code=1000):
        await self.stream.send_all(bytes(self._frames.close(code)))

    async def closed(self, *, pongs=False):
        """Code and reason of the close frame."""
        with trio.fail_after(3600):
            while True:
                opcode, payload = await self.frame()
                if opcode is Opcode.PING and pongs:
                    await self.pong()
                if opcode is Opcode.CLOSE:
                    return int(payload[0]), payload[1]


@pytest.fixture
def connect(world):
    """Opens a WebSocket without a server in between."""
    world.sandbox = world.sandboxes.add()

    @asynccontextmanager
    async def opened(route="exec/stream", *, key=True, closing=None, pair=memory_stream_pair):
        ours, theirs = pair()
        wire = Wire(theirs)
        headers = {**HANDSHAKE, **({"X-API-Key": world_key} if key else {})}
        request = UpgradeRequest(f"/v1/sandboxes/sb-{world.sandbox.id}/{route}", "1.1", Headers(headers))
        async with trio.open_nursery() as nursery:
            served = partial(world.app.sockets.serve, wire, request, trio.Event() if closing is None else closing)
            nursery.start_soon(served)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += await ours.receive_some(1)
            assert head.startswith(b"HTTP/1.1 101 ")
            yield Client(ours, wire)
            ours.send_stream.close()
            ours.receive_stream.close()

    return opened


world_key = "cap_" + "0123456789abcdef" * 2 + "01234567"


async def started(client):
    await client.text('{"type":"start","cmd":"x"}')
    opcode, _ = await client.frame()
    assert opcode is Opcode.TEXT


def ends(events):
    return [event["code"] for event in events if event["event"] == "stream_ended"]


async def test_who_does_not_say_who_asks(autojump_clock, connect, world):
    """4408 after five seconds; the use-case hears nothing of it."""
    async with connect(key=False) as client:
        begun = trio.current_time()
        assert (await client.closed())[0] == 4408
        assert trio.current_time() - begun == pytest.approx(5, abs=0.1)
    assert not world.streams.asked


async def test_who_says_it_half(autojump_clock, connect):
    """A frame that never ends is no message."""
    async with connect(key=False) as client:
        await client.stream.send_all(b"\x81\xfe\x01\x00\1\2\3\4{")
        assert (await client.closed())[0] == 4408


async def test_who_does_not_say_what_is_wanted(autojump_clock, connect):
    """Half a minute for `start`."""
    async with connect() as client:
        begun = trio.current_time()
        code, reason = await client.closed(pongs=True)
        assert (code, trio.current_time() - begun) == (4408, pytest.approx(30, abs=0.1))
        assert reason.startswith("request_timeout: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [(errors.Unauthorized("Revoked."), 4401), (errors.NoTeam("Gone."), 4403), (errors.Forbidden("No."), 4403)],
)
async def test_who_loses_the_right_loses_the_stream(autojump_clock, connect, world, error, code):
    """Within 30 seconds, and the process is let go."""
    async with connect() as client:
        await started(client)
        await trio.sleep(45)
        world.authenticator.failures["api_key"] = error
        begun = trio.current_time()
        assert (await client.closed(pongs=True))[0] == code
        assert trio.current_time() - begun <= 30
        await world.streams.processes[0].left.wait()


async def test_another_stream_is_asked_for_by_message(autojump_clock, connect, world):
    """The same for a token that came in a message."""
    async with connect(key=False) as client:
        await client.text(f'{{"type":"auth","token":"{world_key}"}}')
        await started(client)
        world.authenticator.failures["api_key"] = errors.Unauthorized("Revoked.")
        assert (await client.closed(pongs=True))[0] == 4401


async def test_a_database_that_restarts_ends_nothing(autojump_clock, connect, world):
    """For five minutes; a credential that cannot be asked about is not good for ever."""
    async with connect() as client:
        await started(client)
        world.authenticator.failures["api_key"] = errors.DatabaseUnavailable("Restarting.")
        begun = trio.current_time()
        assert (await client.closed(pongs=True))[0] == 4503
        assert 300 < trio.current_time() - begun <= 390


async def test_a_machine_that_is_gone(autojump_clock, connect, world, events):
    """It acknowledges nothing: cut at the next ping."""
    async with connect() as client:
        await started(client)
        client.wire.quiet = 100.0
        begun = trio.current_time()
        await world.streams.processes[0].left.wait()
        assert trio.current_time() - begun <= 30
        assert client.wire.cuts
    assert ends(events) == [1006]


async def test_a_client_that_answers_no_ping(autojump_clock, connect, world, events):
    """Its machine is there: it has as long as one that does not read."""
    async with connect() as client:
        await started(client)
        begun = trio.current_time()
        await world.streams.processes[0].left.wait()
        assert 900 < trio.current_time() - begun <= 960
    assert ends(events) == [1006]


async def test_a_client_that_answers_stays(autojump_clock, connect, world):
    """For hours, with a ping every half minute."""
    async with connect() as client:
        await started(client)
        pings = 0
        while trio.current_time() < 7200:
            opcode, _ = await client.frame()
            pings += opcode is Opcode.PING
            await client.pong()
        assert 200 < pings < 260
        assert not world.streams.processes[0].left.is_set()


async def test_a_client_that_does_not_read_for_long(autojump_clock, connect, world, events):
    """Ten minutes are nothing; a quarter of an hour ends it."""
    async with connect(pair=lockstep_stream_pair) as client:
        await started(client)
        process = world.streams.processes[0]
        await process.say(b"x" * 65536)
        await trio.sleep(600)
        assert not process.left.is_set()
        await process.left.wait()
        assert 890 < trio.current_time() < 960
    assert ends(events) == [1006]


async def test_no_message_is_left_half_sent(autojump_clock, connect, world):
    """What ends the stream meanwhile waits: the client would take its close frame for the rest of the message."""
    async with connect(pair=lockstep_stream_pair) as client:
        await started(client)
        await world.streams.processes[0].say(b"x" * 1000)
        half = await client.stream.receive_some(500)
        await client.text('{"type":"nonsense"}')
        await trio.sleep(60)
        client._frames.receive_bytes(half)
        text = b""
        while (found := await client.frame())[0] is Opcode.TEXT and b"error" not in text:
            text += found[1].encode()
        assert text.count(b"x") == 1000
        assert (await client.closed() if found[0] is Opcode.TEXT else found[1])[0] == 4400


async def test_only_the_last_ping_is_answered(autojump_clock, connect, world):
    """A thousand pings from a client that does not read are one answer, and the one that was being given."""
    async with connect(pair=lockstep_stream_pair) as client:
        await started(client)
        await world.streams.processes[0].say(b"x" * 1000)
        for number in range(1000):
            await client.ping(str(number).encode())
        seen = [await client.frame() for _ in range(3)]
        assert seen[0][0] is Opcode.TEXT
        assert seen[1:] == [(Opcode.PONG, b"0"), (Opcode.PONG, b"999")]
        process = world.streams.processes[0]
        process.finish()
        assert (await client.frame())[0] is Opcode.TEXT


async def test_a_client_that_does_not_close(autojump_clock, connect, world, events):
    """Our close frame is sent; five seconds later it is over."""
    async with connect() as client:
        await started(client)
        world.streams.processes[0].finish()
        begun = trio.current_time()
        assert (await client.closed())[0] == 1000
        with pytest.raises(EOFError):
            await client.frame()
        assert trio.current_time() - begun == pytest.approx(5, abs=0.1)
    assert ends(events) == [1000]


async def test_what_is_on_its_way_may_arrive(autojump_clock, connect, world):
    """A client that takes the last output slowly is given time, as long as it takes some."""
    async with connect() as client:
        await started(client)
        left = iter(range(100, 0, -1))
        client.wire.unread = lambda: next(left, 0)
        world.streams.processes[0].finish()
        assert (await client.closed())[0] == 1000
        with pytest.raises(EOFError):
            await client.frame()
        assert trio.current_time() > 400
        assert not client.wire.cuts


async def test_what_nobody_takes_does_not_stay(autojump_clock, connect, world):
    """A quarter of an hour without progress."""
    async with connect() as client:
        await started(client)
        client.wire.unread = lambda: 5
        world.streams.processes[0].finish()
        await client.closed()
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await client.frame()
        assert 890 < trio.current_time() < 960
        assert client.wire.cuts


async def test_a_stranger_is_given_no_such_time(autojump_clock, connect):
    """Who was not let in has five seconds."""
    async with connect(key=False) as client:
        client.wire.unread = lambda: 5
        await client.closed()
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await client.frame()
        assert trio.current_time() <= 11


async def test_a_stranger_does_not_stay_by_sipping(autojump_clock, connect):
    """Taking a little of what waits (the answers to a flood of pings) now and then."""
    async with connect(key=False) as client:
        began = trio.current_time()
        client.wire.unread = lambda: 10**6 - round(trio.current_time() - began)
        assert (await client.closed())[0] == 4408
        with trio.fail_after(30):
            while not client.wire.cuts:
                await trio.sleep(1)


async def test_shutdown_does_not_wait_for_who_does_not_read(autojump_clock, connect, world, events):
    """The close frame cannot be sent behind half a message: the connection is cut, the process let go."""
    closing = trio.Event()
    async with connect(closing=closing, pair=lockstep_stream_pair) as client:
        await started(client)
        process = world.streams.processes[0]
        await process.say(b"x" * 65536)
        begun = trio.current_time()
        closing.set()
        await process.left.wait()
        assert trio.current_time() - begun == pytest.approx(5, abs=0.1)
    assert ends(events) == [1001]


async def test_shutdown_hurries_who_is_leaving(autojump_clock, connect, world):
    """Output that is still on its way has five seconds then."""
    closing = trio.Event()
    async with connect(closing=closing) as client:
        await started(client)
        client.wire.unread = lambda: 5
        world.streams.processes[0].finish()
        await client.closed()
        await trio.sleep(100)
        closing.set()
        begun = trio.current_time()
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await client.frame()
        assert trio.current_time() - begun == pytest.approx(5, abs=0.1)


async def test_cancelled_from_outside(autojump_clock):
    """The server's last resort: the connection is cut, nobody waits for a client."""
    _, theirs = lockstep_stream_pair()
    wire = Wire(theirs)

    async def talk(_socket):
        await trio.sleep_forever()

    with trio.move_on_after(1):
        await WebSocket(wire).run(talk, trio.Event())
    assert wire.cuts
