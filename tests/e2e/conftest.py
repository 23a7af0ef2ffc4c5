"""A whole platform as its user has it: `capsule dev` on a host of the test's own, real VMs, HTTP from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.fleet_stage import Stage

START_SECONDS = 240
HTTP_SECONDS = 150


def pytest_collection_modifyitems(items):
    """Everything here boots VMs and makes networks."""
    for item in items:
        if "tests/e2e" in str(item.path):
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.host)


def until(condition, seconds=30.0, what="condition"):
    """Poll `condition` until it is true; its last value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} not reached in {seconds} s (last: {value!r})"
        time.sleep(0.05)


class Platform:
    """One `capsule dev` with its data directory."""

    def __init__(self, data: Path, **settings: str) -> None:
        self.data = data
        self.ready_file = data / "ready.json"
        self.log = data / "platform.log"
        self.process: subprocess.Popen | None = None
        self._settings = settings

    def start(self) -> None:
        """Start and wait until a sandbox can be created."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("CAPSULE_") or k == "CAPSULE_AGENT_IMAGES"}
        self.data.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "capsule", "dev", "--data", self.data, "--ready-file", self.ready_file],
                env={**environ, **self._settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self._is_up, START_SECONDS, "the platform's ready file")

    def _is_up(self) -> bool:
        assert self.process.poll() is None, f"capsule dev ended:\n{self.log.read_text()[-3000:]}"
        return self.ready_file.exists()

    def stop(self) -> None:
        """Ctrl-C."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            assert self.process.wait(90) == 0

    def complaints(self) -> str:
        """The end of what the daemons had to say about failures."""
        events = re.split(r"^(?=20\d\d-)", self.log.read_text(errors="replace"), flags=re.MULTILINE)
        return "".join(event for event in events if "[info " not in event)[-20000:]

    @property
    def ready(self) -> dict:
        """The ready file as it is now."""
        return json.loads(self.ready_file.read_text())

    def client(self) -> httpx.Client:
        """A client with the printed key."""
        ready = self.ready
        return httpx.Client(
            base_url=ready["url"] + "/v1",
            headers={"X-API-Key": ready["api_key"]},
            timeout=HTTP_SECONDS,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )

    def vmm_pids(self, sandbox: dict | None = None) -> list[int]:
        """QEMU processes of this platform, or of one sandbox: golden snapshots are made by VMs that come and go."""
        found = [pid for pid in _pids() if b"qemu-system" in _cmdline(pid) and self._is_ours(pid)]
        return found if sandbox is None else [pid for pid in found if _directory(pid) == self.directory(sandbox)]

    def directory(self, sandbox: dict) -> Path:
        """Where the agent keeps what a sandbox has."""
        return self.data / "agent/sandboxes" / sandbox["id"].removeprefix("sb-")

    def _is_ours(self, pid: int) -> bool:
        directory = _directory(pid)
        return directory is not None and str(directory).startswith(str(self.data))

    def pids(self) -> list[int]:
        """Every process that has to do with this platform."""
        return [pid for pid in _pids() if str(self.data).encode() in _cmdline(pid) or self._is_ours(pid)]


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()]


def _directory(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return None


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def namespaces() -> set[str]:
    """Slots' network namespaces on this host."""
    return {name for path in Path("/run/netns").iterdir() if (name := path.name).startswith("capsule-")}


def in_own_network() -> bool:
    return os.environ.get("CAPSULE_PRIVATE_HOST") == "1"


@pytest.fixture(scope="session")
def own_host():
    """These tests change the host's network: only on a host of their own."""
    if not in_own_network():
        pytest.fail("run these under scripts/private-host (scripts/test does)")


@contextmanager
def open_directory():
    """A directory that PostgreSQL's and the VMs' users can reach; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="capsule-e2e-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="session")
def kept_platform():
    """What the modules about streams hand on to each other: a platform takes longer to come up than they do."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def platform(own_host, request, kept_platform):
    """The platform that a module's tests share; those about streams, which follow each other, share one."""
    one = getattr(kept_platform, "platform", None)
    if one is None:
        one = Platform(kept_platform.enter_context(open_directory()) / "data")
        one.start()
    yield one
    kept_platform.platform = one
    if not _goes_on(request):
        kept_platform.platform = None
        one.stop()
        kept_platform.close()


def _goes_on(request):
    """Whether this module and the next one in this run are about streams."""
    modules = list(dict.fromkeys(item.path for item in request.session.items))
    at = modules.index(request.path)
    return all("test_streams_" in path.name for path in modules[at : at + 2]) and at + 1 < len(modules)


@pytest.fixture
def start_platform(own_host):
    """A platform of the test's own: `start_platform(**environment)`; two cannot run at once on one host."""

    @contextmanager
    def start(**settings):
        with open_directory() as directory:
            one = Platform(directory / "data", **settings)
            one.start()
            try:
                yield one
            except BaseException:
                print(one.complaints())  # noqa: T201 - shown by pytest with the failure
                raise
            finally:
                one.stop()

    return start


@pytest.fixture(scope="module")
def fleet(own_host, postgres_server):
    """Three machines and two control planes that a module's tests share."""
    database = postgres_server.create()
    with open_directory() as directory:
        stage = Stage(directory, postgres_server.dsn(database), until)
        stage.raise_curtain()
        yield stage
        stage.drop_curtain()
        assert stage.leftovers() == []
    postgres_server.drop(database)


@pytest.fixture
def api(platform):
    """HTTP client of the shared platform; what a test created is destroyed after it."""
    with platform.client() as client:
        yield client
        for sandbox in client.get("/sandboxes", params={"limit": 200}).json():
            client.delete(f"/sandboxes/{sandbox['id']}")


@pytest.fixture
def create(api):
    """`create(**fields)` → the sandbox."""

    def make(**fields):
        answer = api.post("/sandboxes", json={"template": "minimal", "memory_mb": 256, **fields})
        assert answer.status_code == 201, answer.text
        return answer.json()

    return make


@pytest.fixture
def run(api):
    """`run(sandbox, "line")` → the exec's answer, which must be 200, or 202 for one in the background."""

    def execute(sandbox, cmd, **fields):
        answer = api.post(f"/sandboxes/{sandbox['id']}/exec", json={"cmd": cmd, **fields})
        assert answer.status_code == (202 if fields.get("background") else 200), answer.text
        return answer.json()

    return execute


@pytest.fixture
def poll():
    """`poll(condition, seconds, what)`."""
    return until


@pytest.fixture
def slots():
    """`slots()` → names of the slots' namespaces."""
    return namespaces


UUID = re.compile(r"^sb-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
