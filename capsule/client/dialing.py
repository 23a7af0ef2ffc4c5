"""Connections for WebSockets: direct, or through the proxy of the environment, as httpx does it for the rest."""

from __future__ import annotations

import ssl
from base64 import b64encode
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import trio

from capsule.client.errors import ConnectionLost
from capsule.client.transport import CONNECT_TIMEOUT, is_loopback

MAX_HEAD = 16 * 1024
"""Bytes of a proxy's answer."""


async def dial(url: str, tls: ssl.SSLContext) -> trio.abc.Stream:
    """A connection to the server of this URL, inside `tls` for https. ConnectionLost."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    try:
        with trio.fail_after(CONNECT_TIMEOUT):
            proxy = None if is_loopback(url) else proxy_for(parts.scheme, host)
            if proxy is None:
                stream: trio.abc.Stream = await trio.open_tcp_stream(host, port)
            else:
                stream = await _through(proxy, host, port)
            return await _in_tls(stream, host, tls) if secure else stream
    except trio.TooSlowError:
        problem = f"the server was not reached within {CONNECT_TIMEOUT:g} seconds"
    except (OSError, ssl.SSLError, trio.BrokenResourceError) as exc:
        problem = f"the server was not reached: {exc.__cause__ or exc}"
    raise ConnectionLost(problem)


def proxy_for(scheme: str, host: str) -> str | None:
    """The URL of the proxy for a host, by HTTP(S)_PROXY, ALL_PROXY and NO_PROXY. ConnectionLost for one that no
    WebSocket can go through."""
    if proxy_bypass(host):
        return None
    known = getproxies()
    proxy = known.get(scheme) or known.get("all")
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if urlsplit(proxy).scheme != "http":
        raise ConnectionLost(
            "streams go through http:// proxies only; name the server in NO_PROXY to go there directly"
        )
    return proxy


async def _through(proxy: str, host: str, port: int) -> trio.abc.Stream:
    """RFC 9110 §9.3.6: CONNECT; what follows the proxy's 2xx is the server's."""
    parts = urlsplit(proxy)
    stream = await trio.open_tcp_stream(parts.hostname or "", parts.port or 80)
    try:
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        await stream.send_all(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{_authorization(parts)}\r\n".encode())
        await _check_answer(stream)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def _check_answer(stream: trio.abc.Stream) -> None:
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        piece = await stream.receive_some(1)  # byte by byte: what follows is not ours to take
        head += piece
        if not piece or len(head) > MAX_HEAD:
            raise ConnectionLost("the proxy did not answer")
    line = head.split(b"\r", 1)[0].decode("ascii", "replace")
    if not line.partition(" ")[2].startswith("2"):
        raise ConnectionLost(f"the proxy refused: {line[:80]}")


def _authorization(proxy: SplitResult) -> str:
    if proxy.username is None:
        return ""
    both = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return f"Proxy-Authorization: Basic {b64encode(both.encode()).decode()}\r\n"


async def _in_tls(stream: trio.abc.Stream, host: str, tls: ssl.SSLContext) -> trio.abc.Stream:
    inside: trio.SSLStream[trio.abc.Stream] = trio.SSLStream(stream, tls, server_hostname=host, https_compatible=True)
    try:
        await inside.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(inside)
        raise
    return inside
