"""A real guest daemon on loopback, and a client that can also misbehave."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.guest.build import build_daemon, compile_daemon
from agent.wire import messages as m
from agent.wire.codec import decode, encode
from agent.wire.framing import FrameBuffer
from agent.wire.limits import INITIAL_CREDIT, VERSION

PATIENCE = 30.0
"""Seconds any single answer may take; only a failing test waits that long."""


def wait_until(condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """Poll a level with a bound."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"still not so after {timeout} s: {what}")


@dataclass
class Outcome:
    """Everything a stream brought."""

    reply: dict[str, Any] | None = None
    fault: str | None = None
    message: str = ""
    channels: dict[int, bytes] = field(default_factory=lambda: defaultdict(bytes))
    notices: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stdout(self) -> bytes:
        return self.channels[1]

    @property
    def stderr(self) -> bytes:
        return self.channels[2]

    @property
    def content(self) -> bytes:
        return self.channels[0]

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [entry for notice in self.notices for entry in notice["entries"]]


class Client:
    """One connection. Frames for streams nobody asked about yet are kept."""

    def __init__(self, port: int, *, initial_credit: int = INITIAL_CREDIT, greet: bool = True) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = FrameBuffer()
        self._last_id = 0
        self._waiting: dict[int, list[m.Frame]] = defaultdict(list)
        if greet:
            try:
                self.greet(initial_credit=initial_credit)
            except BaseException:
                self.close()
                raise

    def greet(self, *, initial_credit: int = INITIAL_CREDIT, timeout: float = PATIENCE) -> None:
        self.send(m.Hello(VERSION, [], initial_credit, 0))
        assert isinstance(self.next_frame(timeout), m.Hello)

    def close(self) -> None:
        self.sock.close()

    def send(self, *frames: m.Frame) -> None:
        self.sock.sendall(b"".join(encode(frame) for frame in frames))

    def next_frame(self, timeout: float = PATIENCE) -> m.Frame:
        """The next frame of any kind. EOFError when the daemon closed, TimeoutError when it is silent."""
        self.sock.settimeout(timeout)
        while (payload := self._buffer.next_frame()) is None:
            data = self.sock.recv(262144)
            if not data:
                raise EOFError
            self._buffer.feed(data)
        return decode(payload)

    def closed_by_peer(self, timeout: float = 8.0) -> bool:
        """Whether the daemon closes at once, not by HELLO's time-out. Frames before that are dropped."""
        try:
            while True:
                self.next_frame(timeout)
        except (EOFError, ConnectionError):
            return True
        except TimeoutError:
            return False

    def open(self, method: str, body: dict[str, Any] | None = None, *, timeout_ms: int = 0) -> int:
        self._last_id += 1
        self.send(m.Open(self._last_id, method, body or {}, timeout_ms))
        return self._last_id

    def stream_frame(self, stream: int, timeout: float = PATIENCE) -> m.Frame:
        """The next frame of `stream`."""
        while not self._waiting[stream]:
            frame = self.next_frame(timeout)
            self._waiting[getattr(frame, "stream", 0)].append(frame)
        return self._waiting[stream].pop(0)

    def finish(self, stream: int, timeout: float = PATIENCE, outcome: Outcome | None = None) -> Outcome:
        """Read `stream` to its last frame, granting credit for everything."""
        outcome = outcome or Outcome()
        while not self._absorb(stream, self.stream_frame(stream, timeout), outcome):
            pass
        return outcome

    def _absorb(self, stream: int, frame: m.Frame, outcome: Outcome) -> bool:
        """Put one frame into `outcome`; whether it was the last one."""
        match frame:
            case m.Data(channel=channel, data=data):
                if channel == 3:
                    outcome.notices.append(msgspec.msgpack.decode(data))
                else:
                    outcome.channels[channel] += data
                self.send(m.Credit(stream, len(data)))
            case m.Reply(body=body):
                outcome.reply = body
                return True
            case m.Failure(code=code, message=message):
                outcome.fault, outcome.message = code, message
                return True
        return False

    def call(self, method: str, body: dict[str, Any] | None = None, *, timeout_ms: int = 0) -> Outcome:
        return self.finish(self.open(method, body, timeout_ms=timeout_ms))

    def upload(self, body: dict[str, Any], content: bytes, *, method: str = "files.write") -> Outcome:
        """Send `content` as far as credit allows, then END."""
        stream = self.open(method, body)
        outcome = Outcome()
        credit, at = INITIAL_CREDIT, 0
        while at < len(content):
            size = min(65536, credit, len(content) - at)
            if size > 0:
                self.send(m.Data(stream, 0, content[at : at + size]))
                credit, at = credit - size, at + size
                continue
            frame = self.stream_frame(stream)
            if isinstance(frame, m.Credit):
                credit += frame.amount
            elif self._absorb(stream, frame, outcome):
                return outcome
        self.send(m.End(stream))
        return self.finish(stream, outcome=outcome)

    def notice(self, stream: int) -> dict[str, Any]:
        """The next notice of `stream`, which must be its next frame."""
        frame = self.stream_frame(stream)
        assert isinstance(frame, m.Data), frame
        assert frame.channel == 3, frame
        return msgspec.msgpack.decode(frame.data)


class Guest:
    """A daemon process and what can be seen of it from outside."""

    def __init__(self, binary: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        command = [*prefix, str(binary), "--serve", "127.0.0.1:0", "--root-check", "off", *arguments]
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], "the daemon does not start"
        line = self.process.stdout.readline()
        assert line.startswith("CAPSULE-READY port="), (line, self.process.communicate(timeout=PATIENCE))
        self.port = int(line.partition("=")[2])
        self.pid = self.process.pid
        self.ended = False
        self._clients: list[Client] = []

    def connect(self, **options: Any) -> Client:
        client = Client(self.port, **options)
        self._clients.append(client)
        return client

    def stop(self) -> None:
        """End it; it must still be there, and have had nothing to complain about."""
        for client in self._clients:
            client.close()
        alive = self.process.poll() is None
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=PATIENCE)
        assert alive or self.ended, errors
        assert errors == ""
        assert self.process.returncode == 0

    def status(self, key: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(key + ":")).split()[1])

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def children(self) -> dict[int, str]:
        """pid -> state letter of every direct child."""
        found: dict[int, str] = {}
        for pid in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
            with suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.pid:
                    found[pid] = fields[0]
        return found


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="session")
def daemon_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "capsule-guest"
    build_daemon(path)
    return path


@pytest.fixture(scope="session")
def sanitized_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "capsule-guest-sanitized"
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
    compile_daemon(path, compiler="gcc", flags=sanitizers)
    return path


@pytest.fixture
def guest(daemon_binary: Path) -> Iterator[Guest]:
    daemon = Guest(daemon_binary)
    yield daemon
    daemon.stop()


@pytest.fixture
def client(guest: Guest) -> Client:
    return guest.connect()


@pytest.fixture
def until() -> Callable[..., Any]:
    """`until(condition, what)`: poll a level with a bound."""
    return wait_until


@pytest.fixture
def running() -> Callable[[int], bool]:
    """Whether a process exists and is no zombie."""
    return is_running


@pytest.fixture
def make_client() -> Iterator[Callable[[int], Client]]:
    """`make_client(port)`: a connection to a daemon that is not a process here, if it answers soon."""
    made: list[Client] = []

    def make(port: int) -> Client:
        client = Client(port, greet=False)
        made.append(client)
        client.greet(timeout=2.0)
        return client

    yield make
    for client in made:
        client.close()


class ControlGroup:
    """The group in which a daemon keeps what it starts, seen through the daemon's own mount."""

    def __init__(self, guest: Guest, mount: Path, name: str) -> None:
        # Stays after the daemon's end, when nothing else reaches its mount any more.
        self._mount = os.open(f"/proc/{guest.pid}/root{mount}", os.O_RDONLY | os.O_DIRECTORY)
        self.path = Path(f"/proc/self/fd/{self._mount}") / name

    def frozen(self) -> bool:
        return "frozen 1" in (self.path / "cgroup.events").read_text()

    def pids(self) -> set[int]:
        files = self.path.rglob("cgroup.procs")
        return {int(pid) for file in files for pid in file.read_text().split()}

    def remove(self) -> None:
        """Kill what is left in it and remove it, if that has not been done."""
        if self.path.exists():
            (self.path / "cgroup.freeze").write_text("0")
            (self.path / "cgroup.kill").write_text("1")
            wait_until(lambda: "populated 0" in (self.path / "cgroup.events").read_text(), "the group is empty")
            for directory in sorted(self.path.glob("**/"), reverse=True):
                directory.rmdir()
        os.close(self._mount)


@pytest.fixture
def start_settling(
    daemon_binary: Path, start_guest: Callable[..., Guest], tmp_path: Path
) -> Iterator[Callable[..., tuple[Guest, ControlGroup]]]:
    """Start daemons that have a control group each, in a private mount of the machine's cgroup2 file system."""
    if os.geteuid() != 0:
        pytest.skip("control groups need root")
    mount = tmp_path / "control-groups"
    mount.mkdir()
    script = ("sh", "-c", 'mount -t cgroup2 none "$0" && exec "$@"', str(mount))
    if subprocess.run(["unshare", "-m", *script, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no control groups v2 on this machine")
    groups: list[ControlGroup] = []

    def start(
        *arguments: str, binary: Path = daemon_binary, prefix: tuple[str, ...] = ()
    ) -> tuple[Guest, ControlGroup]:
        name = f"capsule-test-{os.getpid()}-{len(groups)}"
        command = ("unshare", "-m", *prefix, *script)
        guest = start_guest("--cgroup", str(mount / name), *arguments, binary=binary, prefix=command)
        groups.append(ControlGroup(guest, mount, name))
        return guest, groups[-1]

    yield start
    for group in groups:
        group.remove()


@pytest.fixture
def settling(start_settling: Callable[..., tuple[Guest, ControlGroup]]) -> tuple[Guest, ControlGroup]:
    """A daemon with a control group."""
    return start_settling()


@pytest.fixture
def start_guest(daemon_binary: Path) -> Iterator[Callable[..., Guest]]:
    """Start further daemons, with arguments."""
    started: list[Guest] = []

    def start(*arguments: str, binary: Path = daemon_binary, prefix: tuple[str, ...] = ()) -> Guest:
        started.append(Guest(binary, *arguments, prefix=prefix))
        return started[-1]

    yield start
    for daemon in started:
        daemon.stop()
