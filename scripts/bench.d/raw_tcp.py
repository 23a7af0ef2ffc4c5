"""The baseline of everything that carries bytes into a guest and out of it: bare TCP with a Python program there."""

from __future__ import annotations

import time
from contextlib import suppress

import trio

SINK_PORT = 6000


def sink(size_mb: int) -> str:
    """The program: swallows what comes, or sends `size_mb` MiB."""
    return f"""
import socket
listener = socket.create_server(("", {SINK_PORT}))
while True:
    peer, _ = listener.accept()
    kind = peer.recv(1)
    if kind == b"s":
        while peer.recv(1 << 20): pass
    else:
        block = bytes(1 << 20)
        for _ in range({size_mb}): peer.sendall(block)
    peer.close()
"""


async def raw_tcp(address: str, kind: bytes, size_mb: int) -> float:
    """MB/s into the guest (`s`) or out of it (`r`)."""
    stream = await trio.open_tcp_stream(address, SINK_PORT)
    began = time.perf_counter()
    await stream.send_all(kind)
    if kind == b"s":
        block = bytes(1 << 20)
        for _ in range(size_mb):
            await stream.send_all(block)
        await stream.send_eof()
    while await stream.receive_some(1 << 20):
        pass
    await stream.aclose()
    return size_mb * 1.048576 / (time.perf_counter() - began)


async def wait_for_sink(address: str, size_mb: int) -> None:
    """Until it listens, and is warm."""
    while True:
        with suppress(OSError):
            await raw_tcp(address, b"s", size_mb)
            return
        await trio.sleep(0.1)
