"""settle and thaw through the host's own link: the daemon and its fake answer alike."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager

import pytest
import trio

from agent.guest.client import GuestLink
from agent.guest.fake import FakeGuest

PATIENCE = 30.0


@pytest.fixture(params=["fake", pytest.param("daemon", marks=pytest.mark.host)])
def connect(request):
    """`connect()`: a link to a guest of its own, running."""
    if request.param == "fake":
        guest = FakeGuest("fake")
    else:
        daemon, _ = request.getfixturevalue("start_settling")()
        guest = GuestLink("127.0.0.1", daemon.port)

    @asynccontextmanager
    async def connected():
        with trio.fail_after(3 * PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.run)
                yield guest
                nursery.cancel_scope.cancel()

    return connected


async def call(guest, method, body=None):
    return await guest.call(method, body or {}, timeout=PATIENCE)


async def run(guest, finished):
    """Run a program to its end, then set the event."""
    async with guest.open_stream("exec", {"cmd": "echo hello"}) as stream:
        await stream.end()
        reply = await stream.reply()
    assert reply["exit_code"] == 0
    finished.set()


async def test_settle_and_thaw(connect):
    """What was reached, in any order and number."""
    async with connect() as guest:
        assert await call(guest, "thaw") == {}
        await trio.to_thread.run_sync(os.sync)  # what others have written takes its time
        for body in ({"timeout_ms": 25_000}, {"timeout_ms": 25_000, "thaw_after_ms": 60_000}):
            reply = await call(guest, "settle", body)
            assert (reply["frozen"], reply["synced"]) == (True, True)
            assert 0 <= reply["duration_ms"] < 25_000
            assert set(reply) == {"frozen", "synced", "duration_ms"}
        assert await call(guest, "thaw") == {}


@pytest.mark.parametrize("method", ["thaw", "configure"])
async def test_an_exec_waits_for_the_end(connect, method):
    """It is accepted while all stands still, and runs afterwards."""
    async with connect() as guest:
        await call(guest, "settle")
        finished = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, guest, finished)
            for _ in range(10):
                assert await call(guest, "processes.list")
            assert not finished.is_set()
            assert await call(guest, method) == {}
            await finished.wait()


async def test_the_fake_remembers_the_order():
    """For tests of whoever pauses and resumes."""
    guest = FakeGuest("fake")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.run)
        await call(guest, "settle")
        assert guest.frozen
        await call(guest, "configure", {"machine_id": "a" * 32})
        assert not guest.frozen
        assert guest.calls == ["settle", "configure"]
        assert guest.configured == {"machine_id": "a" * 32}
        nursery.cancel_scope.cancel()
