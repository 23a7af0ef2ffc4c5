"""The server under load, under attack, and on its way out."""

from __future__ import annotations

import json
import resource
import socket
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from capsule.http import server, streams
from capsule.http.protocol import Http11
from capsule.http.server import serve

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def open_connections(world):
    return world.registry.get_sample_value("capsule_http_connections")


async def answers_on(stream, count):
    """Read `count` answers off a connection; their status lines."""
    data = b""
    while data.count(b"HTTP/1.1 ") < count or not data.endswith(b"}"):
        if not (more := await stream.receive_some()):
            raise EOFError
        data += more
    return [line for line in data.replace(b"}HTTP", b"}\nHTTP").splitlines() if line.startswith(b"HTTP/1.1")]


@pytest.fixture
def few_files():
    """The soft limit of an ordinary login; a thousand clients and their server in one process need twice that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_thousand_requests_at_once(few_files, api, until):
    """All are in their handler at the same time, and all are answered; the server sees to its descriptors."""
    path = f"/v1/sandboxes/sb-{api.sandboxes.add().id}/exec"
    api.sandboxes.gates["exec"] = trio.Event()
    body = b'{"cmd":"x"}'
    head = api.head("POST", path, "Content-Type: application/json", f"Content-Length: {len(body)}")
    answers = []

    async def post():
        answers.append(await api.raw(head + body, limit=60))

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(post)
        await until(lambda: len(api.sandboxes.asked) == 1000, 60)
        assert open_connections(api) == 1000
        api.sandboxes.gates["exec"].set()
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
    await until(lambda: open_connections(api) == 0)


async def test_a_client_that_hangs_up_ends_the_call(api, events, until):
    """Its handler is cancelled, it is counted as 499, and nobody else notices."""
    path = f"/v1/sandboxes/sb-{api.sandboxes.add().id}/exec"
    api.sandboxes.gates["exec"] = trio.Event()
    body = b'{"cmd":"x"}'
    async with await trio.open_tcp_stream("127.0.0.1", api.port) as stream:
        head = api.head("POST", path, "Content-Type: application/json", f"Content-Length: {len(body)}")
        await stream.send_all(head + body)
        await until(lambda: api.sandboxes.asked)
    await until(lambda: api.sandboxes.cancelled == ["exec"])
    await until(lambda: [event for event in events if event.get("status") == 499])
    count = "capsule_http_requests_total"
    labels = {"method": "POST", "route": "/v1/sandboxes/{sandbox_id}/exec", "status": "499"}
    assert api.registry.get_sample_value(count, labels) == 1
    assert (await api.client.get("/health")).status_code == 200


async def test_one_connection_many_requests(api):
    """Keep-alive, and two requests sent at once are answered in order."""
    async with await trio.open_tcp_stream("127.0.0.1", api.port) as stream:
        with trio.fail_after(30):
            for _ in range(20):
                await stream.send_all(GET)
                assert await answers_on(stream, 1) == [b"HTTP/1.1 200 "]
            await stream.send_all(GET.replace(b"/health", b"/nope") + GET)
            assert await answers_on(stream, 2) == [b"HTTP/1.1 404 ", b"HTTP/1.1 200 "]
    assert open_connections(api) <= 1


async def test_idle_connections_are_closed(api, monkeypatch, until):
    """Each of many: after an answer the timer always runs (see ApiConnection.handle_messages)."""
    monkeypatch.setattr(server, "IDLE_TIMEOUT", 0.3)
    async with _serving(api.app) as (port, _):
        closed = []

        async def idle():
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                with suppress(EOFError, trio.BrokenResourceError):  # closed before the request, on a slow machine
                    await stream.send_all(GET)
                    await answers_on(stream, 1)
                    assert await stream.receive_some() == b""
                closed.append(stream)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(idle)
        assert len(closed) == 50
    await until(lambda: open_connections(api) == 0)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nX: "])
async def test_a_head_that_never_ends_is_cut_off(api, monkeypatch, sent):
    """Slowloris: a byte now and then does not keep a connection."""
    monkeypatch.setattr(server, "IDLE_TIMEOUT", 0.3)
    async with _serving(api.app) as (port, _), await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(sent)
        with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
            await _trickle(stream)


async def test_a_client_that_does_not_read_is_cut_off(api, monkeypatch, until):
    """Its connection, its handler and what the handler holds are gone after WRITE_TIMEOUT."""
    monkeypatch.setattr(streams, "WRITE_TIMEOUT", 0.3)
    async with _stalled(api, api.port):
        with trio.fail_after(30):
            await api.sandboxes.received.wait()
        await until(lambda: open_connections(api) == 0)


async def test_shutdown_lets_requests_finish(api, until):
    """Idle connections close at once, new ones are refused, the request in progress is answered."""
    path = f"/v1/sandboxes/sb-{api.sandboxes.add().id}/exec"
    gate = api.sandboxes.gates["exec"] = trio.Event()
    answers = []

    async def post(port):
        answers.append(await api.client.post(f"http://127.0.0.1:{port}{path}", json={"cmd": "x"}))

    async with _serving(api.app, grace=20) as (port, shutdown), trio.open_nursery() as nursery:
        async with await trio.open_tcp_stream("127.0.0.1", port) as idle:
            await idle.send_all(GET)
            await answers_on(idle, 1)
            nursery.start_soon(post, port)
            await until(lambda: api.sandboxes.asked)
            shutdown.set()
            with trio.fail_after(20):
                assert await idle.receive_some() == b""
        with pytest.raises(OSError, match=str(port)):
            await trio.open_tcp_stream("127.0.0.1", port)
        gate.set()
    assert [answer.status_code for answer in answers] == [200]


@pytest.mark.parametrize("how", ["handler waits", "client does not read"])
async def test_shutdown_ends_at_its_deadline(api, how, until):
    """Neither a handler that waits for ever nor a client that stops reading holds it longer than the grace."""
    with trio.fail_after(30):
        async with AsyncExitStack() as clients, _serving(api.app, grace=0.3) as (port, shutdown):
            if how == "handler waits":
                api.sandboxes.gates["get"] = trio.Event()
                stream = await clients.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port))
                await stream.send_all(api.head("GET", f"/v1/sandboxes/sb-{api.sandboxes.add().id}"))
                await until(lambda: api.sandboxes.asked)
            else:
                await clients.enter_async_context(_stalled(api, port))
            shutdown.set()
    await until(lambda: open_connections(api) == 0)


async def test_cancelling_the_server_ends_it_at_once(api):
    """Also while a client does not read: hypercorn's shielded writes do not hold us."""
    with trio.fail_after(30):
        async with AsyncExitStack() as clients, trio.open_nursery() as nursery:
            task = partial(serve, api.app, ("127.0.0.1", 0), shutdown=trio.Event(), grace=60)
            await clients.enter_async_context(_stalled(api, await nursery.start(task)))
            nursery.cancel_scope.cancel()


async def test_one_broken_connection_ends_nobody_else(api, monkeypatch, events):
    """A bug below the application is logged and costs that connection only."""

    async def fail(*_arguments):
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(Http11, "stream_send", fail)
        assert await api.raw(GET) == b""
    assert "connection_failed" in [event["event"] for event in events]
    assert (await api.client.get("/health")).status_code == 200


async def test_too_many_connections_are_told_so(api, monkeypatch, until):
    """503 in our shape, and room again when one has gone."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    async with AsyncExitStack() as clients:
        for _ in range(2):
            await clients.enter_async_context(await trio.open_tcp_stream("127.0.0.1", api.port))
        await until(lambda: open_connections(api) == 2)
        answer = await api.raw(b"")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "busy"
    await until(lambda: open_connections(api) == 0)
    assert (await api.client.get("/health")).status_code == 200


async def test_a_body_nobody_wants_does_not_hold_the_connection(api, monkeypatch, until):
    """A GET with an endless body: answered at once, drained a little, then closed; no task stays behind."""
    monkeypatch.setattr("capsule.http.connection.DRAIN_BYTES", 1_000_000)
    async with await trio.open_tcp_stream("127.0.0.1", api.port) as stream:
        await stream.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n")
        with trio.fail_after(30):
            assert (await answers_on(stream, 1)) == [b"HTTP/1.1 200 "]
            with pytest.raises(trio.BrokenResourceError):
                await _flood(stream)
    await until(lambda: open_connections(api) == 0)


async def test_an_address_in_use_is_an_error(api):
    """At once, to whoever started the server."""
    with pytest.raises(OSError, match="in use"):
        await serve(api.app, ("127.0.0.1", api.port), shutdown=trio.Event(), grace=1)


async def _trickle(stream):
    while True:
        await trio.sleep(0.05)
        await stream.send_all(b"x")


async def _flood(stream):
    while True:
        await stream.send_all(bytes(65_536))


def _serving(app, grace=1.0):
    """A second server over the same application; leaving the block shuts it down and waits for it."""
    return _Serving(app, grace)


class _Serving:
    def __init__(self, app, grace):
        self.app, self.grace, self.shutdown = app, grace, trio.Event()

    async def __aenter__(self):
        self.manager = trio.open_nursery()
        nursery = await self.manager.__aenter__()
        task = partial(serve, self.app, ("127.0.0.1", 0), shutdown=self.shutdown, grace=self.grace)
        return await nursery.start(task), self.shutdown

    async def __aexit__(self, *exc):
        self.shutdown.set()
        return await self.manager.__aexit__(*exc)


@asynccontextmanager
async def _stalled(api, port):
    """A client that asked for an endless file and reads nothing; inside the block the server is stuck on it."""
    produced = 0

    async def chunks():
        nonlocal produced
        while True:
            produced += 1
            yield bytes(65_536)

    api.sandboxes.chunks, api.sandboxes.announced = chunks, None
    body = b'{"path": "/a"}'
    path = f"/v1/sandboxes/sb-{api.sandboxes.add().id}/files/read"
    head = api.head("POST", path, "Content-Type: application/json", f"Content-Length: {len(body)}")
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await sock.connect(("127.0.0.1", port))
    async with trio.SocketStream(sock) as stream:
        await stream.send_all(head + body)
        before = -1
        with trio.fail_after(30):
            while not produced or before != produced:
                before = produced
                await trio.sleep(0.05)
        yield
