"""The platform that is measured, the ways into it, and how a figure is printed; for the parts beside this file."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from uuid import UUID

import httpx
import structlog
import trio

from agent.actor.peer import OpenerPeer
from capsule import config
from capsule.db.embedded import run_postgres
from capsule.db.pool import open_database
from capsule.dev.files import read_secrets
from capsule.hosts.authority import load_authority
from capsule.hosts.directory import Directory
from capsule.hosts.links import HostLinks, tls_dial
from capsule.hosts.tls import ClientContexts

GUEST_PORT = 5000
GOLDEN_SECONDS = 180
CALL_SECONDS = 600
LIGHT = ("/bin/true",)
TMPFS = "mkdir -p /mnt/t && mount -t tmpfs -o size=90% t /mnt/t"
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))  # only figures are printed


def show(
    name: str, value: float, unit: str, base: float | None = None, what: str = "", *, goal: float | None = None
) -> None:
    """One line: name, value, ratio to its baseline, the goal for that ratio."""
    ratio = "" if not base else f"   {value / base:6.3f} x {what}"
    wanted = "" if goal is None else f"  (goal <= {goal:g})"
    print(f"{name:<52}{value:>10.2f} {unit:<5}{ratio}{wanted}", flush=True)


def show_median(
    name: str, seconds: list[float], base: list[float] | None = None, what: str = "", *, goal: float | None = None
) -> float:
    """The median in ms, and its ratio to the baseline's; returns the median in seconds."""
    median = statistics.median(seconds)
    show(name, median * 1000, "ms", statistics.median(base) * 1000 if base else None, what, goal=goal)
    return median


def show_steps(steps: list[dict[str, float]]) -> None:
    """The host's own account of where the time went, medians in ms, in one line."""
    names = list(dict.fromkeys(name for one in steps for name in one))
    medians = {name: statistics.median(one.get(name, 0.0) for one in steps) for name in names}
    print("    steps: " + " ".join(f"{name}={value:.1f}" for name, value in medians.items()), flush=True)


@contextmanager
def platform(**settings: str):
    """`capsule dev` in a directory of its own, with these variables; (data directory, ready file's content)."""
    with tempfile.TemporaryDirectory(prefix="capsule-bench-", ignore_cleanup_errors=True) as name:
        data = Path(name)
        data.chmod(0o711)
        ready = data / "ready.json"
        log = (data / "log").open("wb")
        command = [sys.executable, "-m", "capsule", "dev", "--data", str(data), "--ready-file", str(ready)]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **settings})
        try:
            while not ready.exists():
                if process.poll() is not None:
                    sys.exit((data / "log").read_text())
                time.sleep(0.02)
            show("platform start, images cached", time.perf_counter() - began, "s")
            yield data, json.loads(ready.read_text())
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


@asynccontextmanager
async def database():
    """A PostgreSQL of its own, as `capsule dev` runs it; its address."""
    with tempfile.TemporaryDirectory(prefix="capsule-bench-", ignore_cleanup_errors=True) as name:
        root = Path(name)
        root.chmod(0o711)
        async with trio.open_nursery() as nursery:
            handle = await nursery.start(
                partial(run_postgres, root / "data", runtime=root / "run", cache=root / "cache")
            )
            yield handle.dsn
            nursery.cancel_scope.cancel()


def wait_golden(data: Path, count: int = 1) -> None:
    """Until the host has made so many golden snapshots."""
    deadline = time.monotonic() + GOLDEN_SECONDS
    while (data / "log").read_text().count("golden_made") < count:
        if time.monotonic() > deadline:
            sys.exit(f"no golden snapshot within {GOLDEN_SECONDS} s:\n" + (data / "log").read_text()[-4000:])
        time.sleep(0.1)


def user(ready: dict) -> httpx.Client:
    """A client with the printed key."""
    headers = {"X-API-Key": ready["api_key"]}
    return httpx.Client(base_url=ready["url"] + "/v1", headers=headers, timeout=CALL_SECONDS, trust_env=False)


def uuid_of(name: str) -> UUID:
    """Of an id with a prefix."""
    return UUID(name.partition("-")[2])


@asynccontextmanager
async def host_links(data: Path):
    """The agent's wire as the control plane has it."""
    dsn = f"postgresql://capsule@/capsule?host={data / 'run'}"
    settings = config.load({**read_secrets(data), "CAPSULE_DATABASE_URL": dsn})
    async with open_database(dsn, max_size=2) as db, trio.open_nursery() as nursery:
        links = HostLinks(Directory(db), tls_dial(ClientContexts(await load_authority(db, settings))), settings)
        await nursery.start(links.run)
        yield links
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(data: Path, sandbox: dict):
    """That, and the guest daemon's wire as the agent has it."""
    async with host_links(data) as links, trio.open_nursery() as nursery:
        guest = OpenerPeer(await trio.open_tcp_stream(sandbox["host_ip"], GUEST_PORT))
        await nursery.start(guest.run)
        yield links, guest
        nursery.cancel_scope.cancel()


class Subject:
    """One sandbox: what its user does with it over HTTP, and what its host says of it."""

    def __init__(self, api: httpx.Client, links: HostLinks, sandbox: dict) -> None:
        self.api = api
        self.links = links
        self.sandbox = sandbox
        self.path = f"/sandboxes/{sandbox['id']}"
        self.id = str(uuid_of(sandbox["id"]))
        self.host = uuid_of(sandbox["host_id"])

    @classmethod
    async def create(cls, api: httpx.Client, links: HostLinks, **fields: object) -> Subject:
        """A new one."""
        return cls(api, links, await post(api, "/sandboxes", **fields))

    async def exec(self, cmd: str, *args: str) -> float:
        """Run something to its end; the seconds that took."""
        began = time.perf_counter()
        answer = await post(self.api, f"{self.path}/exec", cmd=cmd, args=list(args), timeout_sec=300)
        if answer["exit_code"]:
            sys.exit(f"{cmd}: {answer}")
        return time.perf_counter() - began

    async def pause(self) -> float:
        """Seconds."""
        return await timed(partial(post, self.api, f"{self.path}/pause"))

    async def resume(self) -> float:
        """Seconds."""
        return await timed(partial(post, self.api, f"{self.path}/resume"))

    async def steps(self, method: str) -> dict[str, float]:
        """What the host took for each step of the pause or resume that has just been: asking again changes nothing."""
        state = await self.links.call(self.host, f"sandbox.{method}", {"sandbox_id": self.id}, timeout=60)
        return state["timings_ms"]

    async def destroy(self) -> None:
        """Remove it."""
        await trio.to_thread.run_sync(lambda: self.api.delete(self.path).raise_for_status())


@asynccontextmanager
async def populated(api: httpx.Client, links: HostLinks, *commands: str, memory_mb: int):
    """A sandbox after these commands."""
    subject = await Subject.create(api, links, memory_mb=memory_mb)
    for command in commands:
        await subject.exec("/bin/sh", "-c", command)
    yield subject
    await subject.destroy()


async def post(api: httpx.Client, path: str, **body: object) -> dict:
    """An answer that is no error."""
    answer = await trio.to_thread.run_sync(lambda: api.post(path, json=body or None))
    if answer.is_error:
        sys.exit(f"POST {path}: {answer.status_code} {answer.text}")
    return answer.json()


async def timed(call) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


def written_and_synced(directory: Path, mib: int, *, sync: bool = True) -> float:
    """Seconds of a plain write of so many MiB, and its fsync."""
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(mib):
            file.write(block)
        if sync:
            os.fsync(file.fileno())
        return time.perf_counter() - began
