"""The application over fake services, on a real port of loopback."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import trio
import trio_websocket
from prometheus_client import CollectorRegistry

from capsule.http.app import Application, create_app
from capsule.http.ports import Services
from capsule.http.server import serve

_spec = importlib.util.spec_from_file_location("http_fakes", Path(__file__).with_name("fakes.py"))
fakes = importlib.util.module_from_spec(_spec)
sys.modules["http_fakes"] = fakes
_spec.loader.exec_module(fakes)


@dataclass
class World:
    """The fakes and the application over them."""

    authenticator: Any
    streams: Any
    sandboxes: Any
    templates: Any
    hosts: Any
    ready: Any
    registry: CollectorRegistry
    app: Application
    spool_dir: Path


@dataclass
class Api(World):
    """A world with a server in front of it."""

    client: httpx.AsyncClient
    port: int
    shutdown: trio.Event
    key: str

    async def raw(self, sent: bytes, *, limit: float = 30) -> bytes:
        """Send bytes on a connection of its own; everything that comes back until the server closes."""
        with trio.fail_after(limit):
            stream = await trio.open_tcp_stream("127.0.0.1", self.port)
            async with stream:
                await stream.send_all(sent)
                return b"".join([chunk async for chunk in stream])

    def head(self, method: str, path: str, *lines: str, key: bool = True) -> bytes:
        """The head of a request that ends its connection."""
        credential = [f"X-API-Key: {self.key}"] if key else []
        return "\r\n".join(
            [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *credential, *lines, "", ""]
        ).encode()


@pytest.fixture
def events():
    """What was logged."""
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as caught:
        yield caught


@pytest.fixture
def world(tmp_path, events):
    sandboxes = fakes.FakeSandboxes()
    services = {
        "authenticator": fakes.FakeAuthenticator(),
        "sandboxes": sandboxes,
        "streams": fakes.FakeStreams(sandboxes),
        "templates": fakes.FakeTemplates(),
        "hosts": fakes.FakeHosts(),
        "ready": fakes.FakeReadiness(),
    }
    registry = CollectorRegistry()
    app = create_app(
        Services(**services, people=fakes.nobody(), fleet=fakes.Nobody()),
        registry=registry,
        version="1.2.3",
        spool_dir=tmp_path,
    )
    return World(**services, registry=registry, app=app, spool_dir=tmp_path)


@pytest.fixture
async def api(world):
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        port = await nursery.start(partial(serve, world.app, ("127.0.0.1", 0), shutdown=shutdown, grace=2))
        limits = httpx.Limits(max_connections=2000, max_keepalive_connections=2000)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"X-API-Key": fakes.KEY},
            timeout=30,
            limits=limits,
            trust_env=False,
        ) as client:
            yield Api(**vars(world), client=client, port=port, shutdown=shutdown, key=fakes.KEY)
        shutdown.set()


@pytest.fixture
def served(world):
    """A client of the application in a thread of its own: generated tests are synchronous."""
    started, token, port, shutdown = threading.Event(), None, 0, None

    async def main():
        nonlocal token, port, shutdown
        token, shutdown = trio.lowlevel.current_trio_token(), trio.Event()
        async with trio.open_nursery() as nursery:
            port = await nursery.start(partial(serve, world.app, ("127.0.0.1", 0), shutdown=shutdown, grace=1))
            started.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert started.wait(30)
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": fakes.KEY}, timeout=30, trust_env=False
    ) as client:
        yield client
    token.run_sync_soon(shutdown.set)
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def until():
    """Waits for a level, bounded."""

    async def wait(condition, limit=30):
        with trio.fail_after(limit):
            while not condition():
                await trio.sleep(0.01)

    return wait


@pytest.fixture
def refused():
    """Checks that an answer is a refusal in our form, and gives its `error`."""

    def check(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        error = response.json()["error"]
        assert error["code"] == code
        assert error["message"]
        assert error["request_id"] == response.headers["x-request-id"]
        return error

    return check


class Socket:
    """A client's WebSocket. Messages as dicts or bytes."""

    def __init__(self, connection, stream):
        self.connection = connection
        self.stream = stream

    async def send(self, **message):
        await self.connection.send_message(json.dumps(message))

    async def send_text(self, text):
        await self.connection.send_message(text)

    async def send_bytes(self, data):
        await self.connection.send_message(data)

    async def receive(self, limit=30):
        with trio.fail_after(limit):
            message = await self.connection.get_message()
        return json.loads(message) if isinstance(message, str) else message

    async def close(self, code=1000):
        await self.connection.aclose(code)

    async def closed(self, limit=30):
        """Code and reason of the server's close frame; messages before it are skipped."""
        with trio.fail_after(limit):
            while True:
                try:
                    await self.connection.get_message()
                except trio_websocket.ConnectionClosed as closed:
                    return int(closed.reason.code), closed.reason.reason or ""


class Sockets:
    """Opens WebSockets to a sandbox that runs."""

    def __init__(self, api, events, until):
        self._api = api
        self.events = events
        self.until = until
        self.sandbox = f"sb-{api.sandboxes.add().id}"

    def __getattr__(self, name):
        return getattr(self._api, name)

    def path(self, route, name="v1/sandboxes"):
        return f"/{name}/{self.sandbox}/{route}"

    @asynccontextmanager
    async def open(self, route, *, name="v1/sandboxes", headers=None, key=True):
        sent = [("X-API-Key", self.key)] if key else []
        sent += list((headers or {}).items())
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream, trio.open_nursery() as nursery:
            connection = await trio_websocket.wrap_client_stream(
                nursery, stream, f"127.0.0.1:{self.port}", self.path(route, name), extra_headers=sent
            )
            try:
                yield Socket(connection, stream)
            finally:
                with trio.move_on_after(2, shield=True):
                    await connection.aclose()
                nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def process(self, **start):
        """An exec stream whose process runs."""
        async with self.open("exec/stream") as socket:
            before = len(self.streams.processes)
            await socket.send(type="start", **start)
            assert (await socket.receive())["type"] == "start"
            yield socket, self.streams.processes[before]

    async def broken(self, process, error):
        await self.until(lambda: process._said.statistics().tasks_waiting_receive)
        process.fail(error)


@pytest.fixture
def sockets(api, events, until):
    return Sockets(api, events, until)
