"""The application over fake services, on a real port of loopback."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import trio
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

    async def raw(self, sent: bytes, *, limit: float = 10) -> bytes:
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
def until():
    """Waits for a level, bounded."""

    async def wait(condition, limit=10):
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
