"""The client against the real HTTP layer over fake services, through a relay whose connections a test can cut."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from prometheus_client import CollectorRegistry

from capsule.client import TrioClient
from capsule.http.app import create_app
from capsule.http.ports import Services
from capsule.http.server import serve

_source = Path(__file__).parents[1] / "http" / "fakes.py"
_spec = importlib.util.spec_from_file_location("client_http_fakes", _source)
fakes = importlib.util.module_from_spec(_spec)
sys.modules["client_http_fakes"] = fakes
_spec.loader.exec_module(fakes)


class Relay:
    """Carries bytes between the client and `port`. `cut()` resets every connection; `allowance`: bytes that each new
    connection brings to the client before it is cut; `refusing`: new ones are closed at once."""

    def __init__(self, port):
        self._target = port
        self._streams = set()
        self.port = 0
        self.count = 0
        self.allowance = []
        self.refusing = False

    async def run(self, *, task_status):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._carry, listeners, task_status=task_status)

    async def cut(self):
        for stream in list(self._streams):
            await trio.aclose_forcefully(stream)

    async def _carry(self, client):
        self.count += 1
        if self.refusing:
            await trio.aclose_forcefully(client)
            return
        allowance = self.allowance.pop(0) if self.allowance else None
        server = await trio.open_tcp_stream("127.0.0.1", self._target)
        self._streams |= {client, server}
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, client, server, None)
            await self._pump(server, client, allowance)
            nursery.cancel_scope.cancel()
        self._streams -= {client, server}

    async def _pump(self, source, sink, allowance):
        try:
            while allowance is None or allowance >= 0:
                data = await source.receive_some(65536)
                if not data:
                    return
                await sink.send_all(data if allowance is None else data[:allowance])
                allowance = None if allowance is None else allowance - len(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


@dataclass
class Platform:
    """The server: `url` goes through the relay; the fakes say what was asked, and play."""

    sandboxes: Any
    streams: Any
    templates: Any
    relay: Relay
    url: str
    key: str
    client: TrioClient
    sandbox: Any
    shutdown: trio.Event
    model: Any


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    """No credentials but those that a test gives."""
    for name in ("CAPSULE_URL", "CAPSULE_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CAPSULE_CONFIG", str(tmp_path / "config" / "credentials.json"))


@pytest.fixture
async def platform(tmp_path):
    sandboxes = fakes.FakeSandboxes()
    services = {
        "authenticator": fakes.FakeAuthenticator(),
        "sandboxes": sandboxes,
        "streams": fakes.FakeStreams(sandboxes),
        "templates": fakes.FakeTemplates(),
        "hosts": fakes.FakeHosts(),
        "ready": fakes.FakeReadiness(),
    }
    app = create_app(
        Services(**services, people=fakes.nobody(), fleet=fakes.Nobody()),
        registry=CollectorRegistry(),
        version="1.2.3",
        spool_dir=tmp_path,
    )
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        port = await nursery.start(partial(serve, app, ("127.0.0.1", 0), shutdown=shutdown, grace=1))
        relay = Relay(port)
        await nursery.start(relay.run)
        url = f"http://127.0.0.1:{relay.port}"
        async with TrioClient(url, fakes.KEY) as client:
            sandbox = await client.sandboxes.get(f"sb-{sandboxes.add().id}")
            yield Platform(
                sandboxes=sandboxes,
                streams=services["streams"],
                templates=services["templates"],
                relay=relay,
                url=url,
                key=fakes.KEY,
                client=client,
                sandbox=sandbox,
                shutdown=shutdown,
                model=SimpleNamespace(failure=fakes.ForkFailure, result=fakes.ExecResult),
            )
        shutdown.set()
        nursery.cancel_scope.cancel()


@pytest.fixture
def level():
    """Waits until a count stands still for `still` seconds, bounded; the count."""

    async def wait(count, limit=20, still=0.5):
        with trio.fail_after(limit):
            seen, since = count(), trio.current_time()
            while trio.current_time() - since < still:
                await trio.sleep(0.01)
                if seen != (seen := count()):
                    since = trio.current_time()
            return seen

    return wait


@pytest.fixture
def until():
    """Waits for a level, bounded."""

    async def wait(condition, limit=30):
        with trio.fail_after(limit):
            while not condition():
                await trio.sleep(0.01)

    return wait


@pytest.fixture
def quick(monkeypatch):
    """No pauses between attempts."""
    for module in ("transport", "downloads", "terminals"):
        monkeypatch.setattr(f"capsule.client.{module}.backoff", lambda _attempt: 0.001)
