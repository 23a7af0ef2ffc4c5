"""Bytes of streams: both ways, in order, whole, and never more under way than the reader allows."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from agent.actor.connection import BATCH_BYTES
from agent.actor.inbox import GROWN_BYTES, MAX_WINDOW_BYTES, Growth
from agent.actor.peer import OpenerPeer
from agent.wire import limits
from agent.wire.link import Link, Role
from agent.wire.messages import Data, End, Open


async def echo(method, body, stream):
    """Answers with its own body; the streams' content comes back as it was."""
    async for channel, data in stream:
        await stream.send(data, channel=channel)
    return {"method": method, **body}


async def test_streaming_both_ways(joined):
    """A megabyte in odd pieces on two channels comes back, in order, channel by channel."""
    async with joined(echo) as (opener, _), opener.open_stream("m", {}) as stream:
        content = bytes(range(256)) * 4096
        got = {1: b"", 2: b""}

        async def send() -> None:
            for begin in range(0, len(content), 99_991):
                await stream.send(content[begin : begin + 99_991], channel=1)
                await stream.send(b"x", channel=2)
            await stream.end()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            async for channel, data in stream:
                got[channel] += data
        assert got[1] == content
        assert got[2] == b"x" * 11
        assert await stream.reply() == {"method": "m"}


@pytest.mark.parametrize("size", [1, 100, 511, 512, 513, 65_536, 65_537])
async def test_chunk_sizes(joined, size):
    """Chunks keep their boundaries up to 64 KiB, whatever way they are stored while they wait."""
    async with joined(echo) as (opener, _), opener.open_stream("m", {}) as stream:
        for channel in (3, 0, 255):
            await stream.send(bytes([channel]) * size, channel=channel)
        await stream.end()
        await stream.reply()
        chunks = [chunk async for chunk in stream]
        assert b"".join(data for _, data in chunks) == b"\x03" * size + b"\x00" * size + b"\xff" * size
        assert [channel for channel, _ in chunks] == [n for n in (3, 0, 255) for _ in range(1 + (size > 65_536))]


async def test_more_takes_what_has_come_on_the_same_channel(joined):
    """Not what another channel brought between, no more than asked for, no piece of a chunk; it never waits. Small
    chunks and large ones alike, and all of it counts for the next grant."""
    chunks = [(1, b"a" * 1000), (1, b"b"), (1, b"c" * 3000), (1, b"d" * 600), (2, b"e"), (2, b"f" * 700), (1, b"g")]

    async def print_all(method, body, stream):
        for channel, data in chunks:
            await stream.send(data, channel=channel)
        async for _ in stream:
            pass
        return {}

    async with joined(print_all) as (opener, _), opener.open_stream("m", {}) as stream:
        await wait_all_tasks_blocked()
        assert await anext(stream) == chunks[0]
        assert stream.more(1, 3500) == [b"b", b"c" * 3000]
        assert stream.more(1, 3500) == [b"d" * 600]
        assert stream.more(1, 3500) == []
        assert await anext(stream) == chunks[4]
        assert stream.more(2, 699) == []
        assert stream.more(2, 700) == [b"f" * 700]
        assert await anext(stream) == chunks[6]
        assert stream.more(1, 3500) == []
        assert stream.inbox._consumed == sum(len(data) for _, data in chunks)
        await stream.end()
        assert await stream.reply() == {}


async def test_more_grants_credit(joined):
    """A reader that takes most by `more` holds nobody up."""

    async def print_much(method, body, stream):
        for _ in range(64):
            await stream.send(bytes(65_536))
        return {}

    async with joined(print_much) as (opener, _), opener.open_stream("m", {}) as stream:
        count = 0
        async for channel, data in stream:
            count += len(data) + sum(map(len, stream.more(channel, 262_144)))
        assert count == 64 * 65_536
        assert await stream.reply() == {}


async def test_a_reader_that_stops_stops_the_server(joined):
    """Nobody reads: the server sends its credit and not a byte more. Reading half of it lets exactly that follow."""
    sent = 0

    async def pour(method, body, stream):
        nonlocal sent
        while True:
            await stream.send(b"x" * 4096)
            sent += 4096

    async with joined(pour) as (opener, _), opener.open_stream("m", {}) as stream:
        await wait_all_tasks_blocked()
        assert sent == limits.INITIAL_CREDIT
        read = 0
        while read < limits.INITIAL_CREDIT // 2:
            _, data = await anext(stream)
            read += len(data)
        await wait_all_tasks_blocked()
        assert sent == limits.INITIAL_CREDIT + read
        assert opener.link.bytes_to_send == 0


async def test_a_handler_that_stops_reading_stops_the_opener(joined):
    """The same the other way round; other streams of the connection go on meanwhile."""
    sent = 0
    read_one = trio.Event()

    async def handler(method, body, stream):
        if method == "other":
            return {}
        await read_one.wait()
        async for _ in stream:
            pass
        return {}

    async with joined(handler) as (opener, _), trio.open_nursery() as nursery, opener.open_stream("m", {}) as stream:

        async def pour() -> None:
            nonlocal sent
            for _ in range(200):
                await stream.send(b"x" * 4096)
                sent += 4096
            await stream.end()

        nursery.start_soon(pour)
        await wait_all_tasks_blocked()
        assert sent == limits.INITIAL_CREDIT
        assert await opener.call("other", {}, timeout=5) == {}
        assert sent == limits.INITIAL_CREDIT
        read_one.set()
        assert await stream.reply() == {}
        assert sent == 200 * 4096


async def test_a_stream_whose_answer_is_there_takes_no_more_data(joined):
    """The server answers without reading: the sender stops quietly, also when it waits for credit."""

    async def handler(method, body, stream):
        await anext(stream)
        return {"early": True}

    async with joined(handler) as (opener, _), opener.open_stream("m", {}) as stream:
        await stream.send(b"x" * limits.INITIAL_CREDIT * 4)
        await stream.send(b"x")
        await stream.end()
        assert await stream.reply() == {"early": True}


async def test_sending_and_reading_are_checkpoints(joined):
    """Also when they need not wait: a loop around them can be cancelled and lets others run, every time or in time."""
    async with joined(echo) as (opener, _), opener.open_stream("m", {}) as stream:
        others_ran = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_set, others_ran)
            for _ in range(BATCH_BYTES // 4):
                await stream.send(b"x")
                if others_ran.is_set():
                    break
            assert others_ran.is_set()
        await wait_all_tasks_blocked()
        with trio.testing.assert_checkpoints():
            await anext(stream)
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.send(b"never sent")
        assert scope.cancelled_caught
        await stream.end()
        await stream.reply()
        assert all(chunk == (0, b"x") for chunk in [chunk async for chunk in stream])


async def _set(event):
    event.set()


async def test_the_window_of_a_reader_that_keeps_up_grows(joined):
    """Twice each time up to a megabyte: then that much is under way to a reader that stops, and no more."""
    sent = 0

    async def pour(method, body, stream):
        nonlocal sent
        while True:
            await stream.send(b"x" * 65_536)
            sent += 65_536

    async with joined(pour) as (opener, server), opener.open_stream("m", {}) as stream:
        read = 0
        while stream.inbox._window < MAX_WINDOW_BYTES:
            read += len((await anext(stream))[1])
            assert read < 8 * MAX_WINDOW_BYTES
        while read < 16 * MAX_WINDOW_BYTES:
            read += len((await anext(stream))[1])
        await wait_all_tasks_blocked()
        assert stream.inbox._window == MAX_WINDOW_BYTES
        assert sent - read <= MAX_WINDOW_BYTES
        assert sent - read == MAX_WINDOW_BYTES - stream.inbox._consumed
        assert server.link._streams[1].send_credit == 0


async def test_all_windows_together_grow_only_so_far(joined):
    """A second fast stream finds nothing left, is none the worse, and grows once the first one is gone."""

    async def pour(method, body, stream):
        while True:
            await stream.send(b"x" * 65_536)

    async def read(stream):
        for _ in range(64):
            await anext(stream)
        return stream.inbox._window

    async with joined(pour) as (opener, _):
        opener.growth = Growth(MAX_WINDOW_BYTES - limits.INITIAL_CREDIT)
        async with opener.open_stream("m", {}) as first:
            assert await read(first) == MAX_WINDOW_BYTES
            async with opener.open_stream("m", {}) as second:
                assert await read(second) == limits.INITIAL_CREDIT
        async with opener.open_stream("m", {}) as third:
            assert await read(third) == MAX_WINDOW_BYTES


async def test_a_window_that_may_only_grow_alone_shrinks_when_another_comes(joined):
    """By what is read: then no more than the initial credit is under way. Alone again, it grows again; no byte is lost
    in either."""
    sent = read = 0

    async def pour(method, body, stream):
        nonlocal sent
        while method == "m":
            await stream.send(sent.to_bytes(4) * 16_384)
            sent += 1
        await trio.sleep_forever()

    async def window_after_reading(stream):
        nonlocal read
        for _ in range(64):
            assert (await anext(stream))[1] == read.to_bytes(4) * 16_384
            read += 1
        await wait_all_tasks_blocked()
        return stream.inbox._window

    async with joined(pour) as (opener, _):
        opener.growth = Growth(alone=True)
        async with opener.open_stream("m", {}) as stream:
            assert await window_after_reading(stream) == MAX_WINDOW_BYTES
            async with opener.open_stream("another", {}):
                assert await window_after_reading(stream) == limits.INITIAL_CREDIT
                assert 65_536 * (sent - read) <= limits.INITIAL_CREDIT
            assert await window_after_reading(stream) == MAX_WINDOW_BYTES
        assert opener.growth.take(GROWN_BYTES)  # all was given back


async def test_a_conversation_needs_no_end(joined):
    """Each word is answered before the next is said: whatever is sent leaves at once, in both directions."""
    async with joined(echo) as (opener, _), opener.open_stream("m", {}) as stream:
        await wait_all_tasks_blocked()
        for word in (b"one", b"two", b"three"):
            with trio.fail_after(5):
                await stream.send(word)
                assert await anext(stream) == (0, word)
            await wait_all_tasks_blocked()


@pytest.mark.parametrize("size", [1, 30_000, 65_536])
async def test_a_message_is_not_cut_by_credit(joined, size):
    """Messages up to 64 KiB arrive whole however the credit falls, in both directions: frames of notices are maps."""
    async with joined(echo) as (opener, _), opener.open_stream("m", {}) as stream:

        async def pour() -> None:
            for _ in range(40):
                await stream.send(b"x" * size)
            await stream.end()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour)
            await wait_all_tasks_blocked()  # all credit of both directions is spent
            assert [len(data) async for _, data in stream] == [size] * 40


@pytest.mark.parametrize("credit", [0, 1, 3, 100])
async def test_a_peer_with_a_small_window(credit):
    """A receiver that starts with little credit, or none, gets its bytes as it grants them."""
    near, far = trio.testing.memory_stream_pair()
    link = Link(Role.SERVER, now=0.0, initial_credit=credit)
    peer = OpenerPeer(near)
    got = bytearray()

    async def server() -> None:
        await far.send_all(link.data_to_send())
        while data := await far.receive_some():
            for frame in link.receive_data(data, 0.0):
                match frame:
                    case Open(stream=number) if credit == 0:
                        link.grant(number, 5)
                    case Data(stream=number, data=chunk):
                        got.extend(chunk)
                        link.grant(number, len(chunk))
                    case End(stream=number):
                        link.reply(number, {})
            if link.bytes_to_send:
                await far.send_all(link.data_to_send())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server)
        await nursery.start(peer.run)
        async with peer.open_stream("m", {}) as stream:
            await stream.send(bytes(range(256)))
            await stream.end()
            await stream.reply()
        peer.close()
    assert got == bytes(range(256))
