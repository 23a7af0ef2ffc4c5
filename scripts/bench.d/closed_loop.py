"""Clients that send the next request when the last was answered, over kept connections: threads and bare sockets, so
that they cost little beside the server that is measured."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Sample:
    """What one kind of request came to, over all its rounds."""

    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Requests a second, in a good round: the upper quartile, as others on the machine only ever slow us down."""
        return statistics.quantiles(self.rates, n=4)[2]

    @property
    def cost(self) -> float:
        """Seconds of processor time of the server for one request, in a good round: the lower quartile."""
        return statistics.quantiles(self.processor, n=4)[0]

    @property
    def p99(self) -> float:
        """Seconds, of all requests."""
        return sorted(self.seconds)[int(len(self.seconds) * 0.99) - 1]


def request(path: str, *, method: str = "GET", **headers: str) -> bytes:
    """A request without a body, as it goes over the wire."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: bench", *lines, "", ""]).encode()


def load(port: int, pid: int, sent: bytes | Sequence[bytes], *, clients: int, seconds: float, into: Sample) -> None:
    """One round: so many clients for so long against the server of that process. `sent`: by all of them, or by each."""
    taken: list[list[float]] = [[] for _ in range(clients)]
    failures: list[BaseException] = []

    def client(mine: list[float], sends: bytes) -> None:
        try:
            _client(port, sends, time.perf_counter() + seconds, mine)
        except BaseException as err:  # noqa: BLE001 - raised again below
            failures.append(err)

    each = [sent] * clients if isinstance(sent, bytes) else sent
    threads = [threading.Thread(target=client, args=both) for both in zip(taken, each, strict=True)]
    used, began = processor_seconds(pid), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - began
    if failures:
        raise failures[0]
    count = sum(map(len, taken))
    into.seconds += [one for mine in taken for one in mine]
    into.rates.append(count / wall)
    into.processor.append((processor_seconds(pid) - used) / count)


def processor_seconds(pid: int) -> float:
    """Of all threads of a process, so far; to the nanosecond."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def _client(port: int, sent: bytes, end: float, taken: list[float]) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (began := time.perf_counter()) < end:
            peer.sendall(sent)
            _answer(peer)
            taken.append(time.perf_counter() - began)


def _answer(peer: socket.socket) -> None:
    """Read one answer; anything but a success is an error."""
    data = peer.recv(65536)
    while b"\r\n\r\n" not in data:
        data += _more(peer)
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 20"):
        raise RuntimeError(head.decode(errors="replace"))
    lengths = [line.partition(b":")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"content-le")]
    length = int(lengths[0]) if lengths else 0
    while len(body) < length:
        body += _more(peer)


def _more(peer: socket.socket) -> bytes:
    data = peer.recv(65536)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data
