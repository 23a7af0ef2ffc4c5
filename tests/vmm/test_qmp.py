"""The QMP client against a server that answers what a test tells it to."""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import suppress

import pytest
import trio
import trio.testing

from agent.vmm import qmp
from agent.vmm.qmp import QmpClient, QmpRefused, QmpTimeout, QmpUnreachable, QmpViolation

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
OK = b'{"return": {}, "id": 1}\r\n'


@pytest.fixture
async def pair():
    """A client and the other end of its connection."""
    ours, theirs = trio.socket.socketpair()
    async with trio.SocketStream(ours) as stream, trio.SocketStream(theirs) as server:
        yield QmpClient(stream), server


async def test_an_answer_is_found_among_events_and_split_bytes(pair):
    """Events and answers to somebody else's questions are passed over, however the bytes are cut."""
    client, server = pair
    lines = b'{"event": "STOP", "data": {}}\r\n{"return": "old", "id": 99}\r\n{"return": {"status": "x"}, "id": 1}\r\n'

    async def answer():
        for byte in lines:
            await server.send_all(bytes([byte]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        assert await client.execute("query-status", timeout=5) == {"status": "x"}


async def test_arguments_reach_qemu(pair):
    """One line of JSON with the command, its arguments and our id."""
    client, server = pair
    await server.send_all(OK)
    await client.execute("ringbuf-read", timeout=5, device="console", size=10)
    sent = await server.receive_some()
    assert sent == b'{"execute":"ringbuf-read","arguments":{"device":"console","size":10},"id":1}\n'


async def test_a_descriptor_is_handed_over(pair):
    """It travels with its command; ours stays open."""
    client, server = pair
    await server.send_all(OK)
    with tempfile.TemporaryFile() as file:
        file.write(b"content")
        file.flush()
        await client.give("state", file.fileno(), timeout=5)
        text, (received,), _, _ = socket.recv_fds(server.socket._sock, 4096, 1)
        assert text == b'{"execute":"getfd","arguments":{"fdname":"state"},"id":1}\n'
        assert os.pread(received, 20, 0) == b"content"
        os.close(received)
        assert os.fstat(file.fileno()).st_size == 7


async def test_a_refusal_is_typed_and_the_connection_goes_on(pair):
    """QEMU's error class and words; the next command works."""
    client, server = pair
    await server.send_all(b'{"error": {"class": "DeviceNotFound", "desc": "no such device"}, "id": 1}\n')
    with pytest.raises(QmpRefused, match="cont: no such device") as caught:
        await client.execute("cont", timeout=5)
    assert caught.value.kind == "DeviceNotFound"
    await server.send_all(b'{"return": 7, "id": 2}\n')
    assert await client.execute("cont", timeout=5) == 7


async def test_silence_is_a_timeout(pair, autojump_clock):
    """A hung QEMU costs the caller its deadline."""
    client, _ = pair
    started = trio.current_time()
    with pytest.raises(QmpTimeout, match="query-status within 5 s"):
        await client.execute("query-status", timeout=5)
    assert trio.current_time() - started == 5


async def test_cancellation_is_not_a_timeout(pair):
    """Who cancels us gets Cancelled, not an error of ours."""
    client, _ = pair
    with trio.move_on_after(0.01) as scope:
        await client.execute("query-status", timeout=60)
    assert scope.cancelled_caught


async def test_a_closed_connection_is_said(pair):
    """QEMU went away in the middle."""
    client, server = pair
    await server.aclose()
    with pytest.raises(QmpUnreachable):
        await client.execute("query-status", timeout=5)


@pytest.mark.parametrize("line", [b"junk\n", b"\xff\xfe\n", b"[]\n", b'{"return": 1, "id": "one"}\n', b"\n"])
async def test_what_is_not_qmp_is_refused(pair, line):
    """Whatever comes, it is a typed error."""
    client, server = pair
    await server.send_all(line)
    with pytest.raises(QmpViolation):
        await client.execute("query-status", timeout=5)


async def test_an_endless_line_costs_bounded_memory(pair):
    """A line without an end is refused once it is longer than any answer."""
    client, server = pair

    async def flood():
        with suppress(trio.BrokenResourceError):
            while True:
                await server.send_all(b"x" * 65536)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        with pytest.raises(QmpViolation, match="more than"):
            await client.execute("query-status", timeout=20)
        await client._stream.aclose()
    assert len(client._received) <= qmp.MAX_LINE_BYTES + qmp.RECEIVE_BYTES


async def test_an_event_is_found_in_a_flood_of_others(pair):
    """A guest can make QEMU report as many errors as it likes; the end of the guest is still seen."""
    client, server = pair
    noise = b'{"event": "BLOCK_IO_ERROR", "data": {"reason": "SHUTDOWN"}}\n' * 5000
    end = b'{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}\n'

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.send_all, noise + end)
        assert await client.wait_event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}


async def test_connecting_negotiates(tmp_path):
    """Greeting, capabilities, then commands: and a path longer than a socket's address may be."""
    directory = tmp_path / ("x" * 150)
    directory.mkdir()
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    async with trio.open_nursery() as nursery:
        short = tmp_path / "s"
        await listener.bind(str(short))
        short.rename(directory / "qmp.sock")
        listener.listen()

        async def serve():
            connection, _ = await listener.accept()
            async with trio.SocketStream(connection) as server:
                await server.send_all(GREETING + OK + b'{"return": "fine", "id": 2}\n')
                await server.receive_some()
                await server.receive_some()

        nursery.start_soon(serve)
        async with qmp.connect(directory, "qmp.sock", timeout=5) as client:
            assert await client.execute("query-status", timeout=5) == "fine"
    listener.close()


async def test_no_socket_is_unreachable(tmp_path):
    """Nothing listens: a typed error at once."""
    with pytest.raises(QmpUnreachable):
        async with qmp.connect(tmp_path, "qmp.sock", timeout=5):
            pass


async def test_a_server_that_never_greets_is_a_timeout(tmp_path, autojump_clock):
    """QEMU listens, but is busy with another client or hangs."""
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    with listener:
        await listener.bind(str(tmp_path / "qmp.sock"))
        listener.listen()
        with pytest.raises(QmpTimeout, match="greeting"):
            async with qmp.connect(tmp_path, "qmp.sock", timeout=5):
                pass
