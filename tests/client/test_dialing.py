"""Streams go through the proxy of the environment, as requests do; a loopback address is reached directly."""

from __future__ import annotations

import pytest
import trio

from capsule.client import ConnectionLost, dialing


@pytest.fixture
async def proxy(platform, monkeypatch):
    """One that lets through what it is asked for; `heard` has the heads."""
    heard, answers = [], [b"HTTP/1.1 200 Connection established\r\n\r\n"]

    async def carry(client):
        async with client:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += await client.receive_some()
            heard.append(head.decode())
            await client.send_all(answers[0])
            server = await trio.open_tcp_stream("127.0.0.1", platform.relay.port)
            async with server, trio.open_nursery() as nursery:
                nursery.start_soon(_copy, client, server)
                await _copy(server, client)
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, carry, [listener])
        monkeypatch.setenv("HTTP_PROXY", f"http://me:s%20t@127.0.0.1:{listener.socket.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "")
        yield heard, answers
        nursery.cancel_scope.cancel()


async def _copy(source, sink):
    try:
        async for data in source:
            await sink.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


async def test_a_stream_goes_through_the_proxy(platform, proxy, monkeypatch, until):
    """CONNECT with the proxy's own credentials, and without ours; then the stream is as any."""
    monkeypatch.setattr(dialing, "is_loopback", lambda _: False)
    heard, _ = proxy
    async with platform.sandbox.stream("x") as process:
        await process.send(b"hello")
        await until(lambda: platform.streams.processes and platform.streams.processes[0].received == b"hello")
    assert heard[0].startswith(f"CONNECT 127.0.0.1:{platform.relay.port} HTTP/1.1\r\n")
    assert "Proxy-Authorization: Basic bWU6cyB0" in heard[0]
    assert platform.key not in heard[0]


async def test_a_proxy_that_refuses_is_named(platform, proxy, monkeypatch):
    """Its status is in the message; one that is no http:// proxy is refused with what to do."""
    monkeypatch.setattr(dialing, "is_loopback", lambda _: False)
    proxy[1][0] = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"
    with pytest.raises(ConnectionLost, match="407"):
        await dialing.dial(platform.url, platform.client._transport.tls)
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(ConnectionLost, match="NO_PROXY"):
        await dialing.dial(platform.url, platform.client._transport.tls)


async def test_loopback_needs_no_proxy(platform, proxy):
    """The proxy hears nothing."""
    await trio.aclose_forcefully(await dialing.dial(platform.url, platform.client._transport.tls))
    assert proxy[0] == []
