"""Heartbeats when every thread that others share is taken."""

from __future__ import annotations

import threading

import pytest
import trio

from agent.enrol import resolver
from agent.enrol.errors import ControlPlaneUnreachable
from agent.enrol.heartbeat import Heartbeat
from agent.enrol.registration import ControlPlane

ANSWER = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"


class Server:
    """Answers any request; counts them. Each on a connection of its own, so that every beat looks the name up."""

    def __init__(self):
        self.requests = 0
        self.arrived = trio.Event()

    async def serve(self, stream):
        data = b""
        while b"\r\n\r\n" not in data:
            data += await stream.receive_some()
        self.requests += 1
        self.arrived.set()
        await stream.send_all(ANSWER)
        await stream.aclose()


@pytest.fixture
async def server(nursery):
    server = Server()
    listeners = await nursery.start(trio.serve_tcp, server.serve, 0)
    server.port = listeners[0].socket.getsockname()[1]
    return server


@pytest.fixture
async def full(nursery):
    """All of Trio's default threads, blocked, and others waiting for them."""
    release = threading.Event()
    limiter = trio.to_thread.current_default_thread_limiter()
    for _ in range(int(limiter.total_tokens) + 20):
        nursery.start_soon(trio.to_thread.run_sync, release.wait, 60)
    while limiter.available_tokens:
        await trio.sleep(0.01)  # a level, bounded by the limiter
    yield limiter
    release.set()


async def test_full_threads_do_not_delay_a_heartbeat(server, full, credentials):
    """The control plane goes by name, and nobody gets a thread: beats are answered all the same."""
    with trio.fail_after(40):
        async with ControlPlane(f"http://localhost:{server.port}") as control_plane:
            heartbeat = Heartbeat(control_plane, None, credentials, interval=0.05, wall=lambda: 0.0)
            async with trio.open_nursery() as beating:
                await beating.start(heartbeat.run)
                await heartbeat.presence.wait_for("online")
                while server.requests < 5:
                    server.arrived = trio.Event()
                    await server.arrived.wait()
                beating.cancel_scope.cancel()
    assert full.available_tokens == 0


async def test_look_ups_that_hang_take_so_many_threads(credentials, monkeypatch):
    """A name server that is away: calls end in time, and the abandoned look-ups do not pile up."""
    release, running = threading.Event(), []

    def hang(*_):
        running.append(1)
        release.wait(60)
        raise OSError("away")

    monkeypatch.setattr(resolver.socket, "getaddrinfo", lambda *arguments, **_: hang(*arguments))
    own = resolver.OwnThreads()
    for _ in range(resolver.LOOK_UPS + 5):
        with trio.move_on_after(0.02):
            await own.getaddrinfo(b"control.example", 80)
    with trio.fail_after(20):
        while len(running) < resolver.LOOK_UPS:  # a thread may come late
            await trio.sleep(0.01)
    assert len(running) == resolver.LOOK_UPS
    release.set()


async def test_a_name_that_is_not_there_is_no_refusal(credentials):
    async with ControlPlane("http://nowhere.invalid:1") as control_plane:
        with pytest.raises(ControlPlaneUnreachable):
            await control_plane.heartbeat(credentials)
