"""What our protocol costs beside the bare TLS it runs on; goals: a third of the requests, two thirds of the bytes.

Run: `.venv/bin/python scripts/bench.d/wire.py`. Prints `name  value unit  ratio-to-baseline`, a line each.

A server process and a client process on loopback, mutual TLS 1.3, the same `TlsStream` everywhere. A round runs every
measurement once, so that a noisy moment hits the thing and its baseline alike; medians of the rounds, and of the
rounds' ratios.
- requests: 64 tasks, each asks and waits. Ours: one connection, `OpenerPeer.call` with a small body. Baseline: 64
  connections, a task on each end of each, 64 bytes there and 64 back: no framing, no multiplexing, no deadlines.
- bulk: 64 KiB chunks to a reader. Ours: one stream with its credit. Baseline: `send_all` of the same chunks.
"""

from __future__ import annotations

import datetime as dt
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.actor.peer import OpenerPeer
from agent.actor.server import ServedStream, ServerPeer
from agent.actor.tls import TlsStream, connect_tls, serve_tls

ROUNDS = 9
SECONDS = 0.5
WAYS = 64
MESSAGE = b"x" * 64
CHUNK = b"x" * 65_536
BODY = {"sandbox": "sb-0123456789abcdef", "offset": 12}

# --- certificates ---------------------------------------------------------------------------------------------------


def make_certificate(path: Path) -> None:
    """A certificate that both sides use and trust, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - dt.timedelta(hours=1)).not_valid_after(now + dt.timedelta(days=1))
    certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem, pkcs8, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    signed = certificate.sign(key, hashes.SHA256())
    path.write_bytes(key.private_bytes(pem, pkcs8, plain) + signed.public_bytes(pem))


def context(side: int, path: str) -> ssl.SSLContext:
    """Mutual TLS 1.3."""
    made = ssl.SSLContext(side)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(path)
    made.load_verify_locations(path)
    return made


# --- the server process ---------------------------------------------------------------------------------------------


async def handle(method: str, body: dict[str, Any], stream: ServedStream) -> dict[str, Any]:
    """`echo` answers with its body; `bulk` swallows what it is sent."""
    if method == "bulk":
        async for _ in stream:
            pass
    return body


async def serve_ours(stream: TlsStream) -> None:
    await ServerPeer(stream, handle).run()


async def serve_bare(stream: TlsStream) -> None:
    """Says `e` (echo) or `b` (bulk) first, then either."""
    try:
        if await stream.receive_some(1) == b"e":
            while data := await stream.receive_some():
                await stream.send_all(data)
        else:
            while await stream.receive_some():
                pass
    except trio.BrokenResourceError:
        return


async def server(path: str) -> None:
    """Print the two ports, then serve until killed."""
    tls = context(ssl.PROTOCOL_TLS_SERVER, path)
    async with trio.open_nursery() as nursery:
        for handler in (serve_ours, serve_bare):
            port = await nursery.start(partial(serve_tls, handler, host="127.0.0.1", port=0, context=tls))
            print(port, flush=True)


# --- the client process ---------------------------------------------------------------------------------------------


async def requests(asks: list[Any]) -> float:
    """Requests per second with one task for each of `asks`."""
    done = 0

    async def repeat(ask: Any) -> None:
        nonlocal done
        while True:
            await ask()
            done += 1

    with trio.move_on_after(SECONDS):
        async with trio.open_nursery() as nursery:
            for ask in asks:
                nursery.start_soon(repeat, ask)
    return done / SECONDS


async def ask_bare(stream: TlsStream) -> None:
    await stream.send_all(MESSAGE)
    left = len(MESSAGE)
    while left:
        left -= len(await stream.receive_some())


async def megabytes(send: Any) -> float:
    """MB per second of `send(CHUNK)`."""
    began, sent = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        await send(CHUNK)
        sent += len(CHUNK)
    return sent / (time.perf_counter() - began) / 1e6


async def measure(ours: int, bare: int, tls: ssl.SSLContext) -> dict[str, list[float]]:
    """Figures of all rounds by name."""
    connect = partial(connect_tls, "127.0.0.1", context=tls)
    figures: dict[str, list[float]] = {name: [] for name in ("requests", "requests bare", "bulk", "bulk bare")}
    for _ in range(ROUNDS):
        streams = [await connect(bare) for _ in range(WAYS)]
        for stream in streams:
            await stream.send_all(b"e")
        figures["requests bare"].append(await requests([partial(ask_bare, stream) for stream in streams]))
        for stream in streams:
            await trio.aclose_forcefully(stream)
        async with trio.open_nursery() as nursery:
            peer = OpenerPeer(await connect(ours))
            await nursery.start(peer.run)
            figures["requests"].append(await requests([partial(peer.call, "echo", BODY, timeout=10)] * WAYS))
            peer.close()
        async with await connect(bare) as stream:
            await stream.send_all(b"b")
            figures["bulk bare"].append(await megabytes(stream.send_all))
        async with trio.open_nursery() as nursery:
            peer = OpenerPeer(await connect(ours))
            await nursery.start(peer.run)
            async with peer.open_stream("bulk", {}) as opened:
                figures["bulk"].append(await megabytes(opened.send))
            peer.close()
    return figures


def run() -> list[tuple[str, float, str, float]]:
    """(name, value, unit, ratio to the baseline) for each measurement."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "bench.pem")
        make_certificate(path)
        command = [sys.executable, __file__, "--serve", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None  # noqa: S101
                ports = int(process.stdout.readline()), int(process.stdout.readline())
                figures = trio.run(measure, *ports, context(ssl.PROTOCOL_TLS_CLIENT, str(path)))
            finally:
                process.kill()
    lines = []
    for name, label, unit in (("requests", "wire_requests_64_way", "1/s"), ("bulk", "wire_bulk_64_kib", "MB/s")):
        ours, bare = figures[name], figures[f"{name} bare"]
        ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
        lines += [(f"{label}_bare_tls", statistics.median(bare), unit, 1.0)]
        lines += [(label, statistics.median(ours), unit, ratio)]
    return lines


def main() -> None:
    """Serve when told to, else measure and print."""
    if sys.argv[1:2] == ["--serve"]:
        trio.run(server, sys.argv[2])
        return
    for name, value, unit, ratio in run():
        print(f"{name:32}  {value:10.0f} {unit:5}  {ratio:.2f}")


if __name__ == "__main__":
    main()
