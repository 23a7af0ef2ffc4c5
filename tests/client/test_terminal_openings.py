"""Opening a terminal and coming back to it, when the connection fails at the worst moment."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager

import pytest
import trio

from capsule.client import ApiError, CapsuleError, ConnectionLost, terminals
from capsule.client.sockets import converted


async def playing(platform, until, count=1):
    await until(lambda: len(platform.streams.processes) >= count)
    return platform.streams.processes[count - 1]


@pytest.mark.parametrize("reached", [True, False])
async def test_a_terminal_that_was_asked_for_is_not_lost(platform, until, quick, reached):
    """Cut before the server's answer: it is asked for by the tag that we made up; if it is not there, made anew."""
    hold = trio.Event()
    original, calls = platform.streams.exec, []

    @asynccontextmanager
    async def exec_(principal, sandbox, call):
        calls.append(call.tag)
        if len(calls) == 1:
            if reached:
                platform.streams.add(pid=42, tag=call.tag, terminal=True)
            await hold.wait()
        async with original(principal, sandbox, call) as process:
            yield process

    platform.streams.exec = exec_
    async with trio.open_nursery() as nursery:

        async def cut():
            await until(lambda: calls)
            await platform.relay.cut()

        nursery.start_soon(cut)
        with trio.fail_after(20):
            async with platform.sandbox.terminal("bash") as terminal:
                assert re.fullmatch("pty-[0-9a-f]{8}", calls[0])
                assert (terminal.tag, terminal.received, set(calls)) == (calls[0], 0, {terminal.tag})
    assert len(calls) == (1 if reached else 2)
    assert [call[0] for call in platform.streams.asked].count("attach") == 1


async def test_a_terminal_with_a_tag_of_yours_is_asked_for_once(platform, until):
    """There may be another one with that tag: it is not ours to take."""
    calls = []

    @asynccontextmanager
    async def exec_(principal, sandbox, call):
        calls.append(call.tag)
        await trio.sleep_forever()
        yield

    platform.streams.exec = exec_
    async with trio.open_nursery() as nursery:

        async def cut():
            await until(lambda: calls)
            await platform.relay.cut()

        nursery.start_soon(cut)
        with trio.fail_after(20), pytest.raises(ConnectionLost):
            async with platform.sandbox.terminal("bash", tag="mine", reconnect=True):
                pass
    assert calls == ["mine"]


async def test_a_proxy_whose_server_starts_anew_is_waited_for(platform, until, quick, monkeypatch):
    """502 instead of the upgrade: it passes."""
    async with platform.sandbox.terminal("bash", reconnect=True) as terminal:
        fake = await playing(platform, until)
        again = platform.streams.add(pid=42, tag=fake.tag, terminal=True)
        refusals = [ApiError(502, "unknown", "Bad Gateway")]
        opening = terminals.open_socket

        def open_socket(*arguments):
            if refusals:
                raise refusals.pop()
            return opening(*arguments)

        monkeypatch.setattr(terminals, "open_socket", open_socket)
        await platform.relay.cut()
        await until(lambda: again in platform.streams.processes)
        again.finish()
        assert (await terminal.wait()).exit_code == 0


@pytest.mark.parametrize("said", [{"type": "started"}, {"type": "started", "tag": "x", "offset": "0"}])
async def test_nonsense_from_the_server_is_an_error_of_ours(said):
    """No KeyError, no TypeError: what the caller catches."""
    with pytest.raises(CapsuleError, match="does not understand"):
        converted(said, terminals._Started)
