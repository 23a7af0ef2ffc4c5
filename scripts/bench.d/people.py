"""What it costs to know who asks, and a page of an audit trail of a million rows.

The same GET of the same control plane over the same database: with an API key, with a session's token, and with an
authenticator that knows the answer beforehand (the baseline). The goal: knowing who asks is a fifth of a request.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import trio
from closed_loop import Sample, load, request
from stage import database, show
from trail import measure_pages

from agent.actor.logs import configure_logs
from capsule import config, control
from capsule.auth.keys import canonical, digest, new_key
from capsule.auth.sessions import SessionHolder, SessionTokens
from capsule.db.migrate import migrate
from capsule.db.pool import Database, open_database
from capsule.db.queries import keys, sandboxes, sessions, teams, users
from capsule.principals import Principal, Session, User

ROUNDS, SECONDS = 24, 0.4
CLIENTS = (1, 16)
SHARE = 0.2
"""What authentication may be of a request."""
CALLS = 300


@dataclass
class Stage:
    """One person with one key in one team with one sandbox."""

    settings: config.Settings
    team: UUID
    user: UUID
    key: str
    token: str
    sandbox: UUID


async def fill(db: Database, dsn: str) -> Stage:
    """The person and what they have."""
    settings = config.Settings(database_url=dsn, secret_key=secrets.token_hex(32))
    key, sandbox = new_key(), uuid4()

    async def make(tx):
        user = await users.insert(tx, email="ada@example.com", name="Ada")
        team = await teams.insert(tx, name="Ada's Team", owner_id=user.id, is_default=True)
        await keys.insert(tx, team_id=team.id, name="ci", prefix=key.prefix, sha256=key.sha256, created_by=user.id)
        await sandboxes.insert(
            tx, id=sandbox, team_id=team.id, template="minimal", vcpus=1, memory_mb=512, disk_mb=1024, timeout_sec=0,
            metadata={}, transition_deadline=datetime.now(UTC) + timedelta(hours=5),
        )  # fmt: skip
        return team.id, user.id, await tx.fetchval("select clock_timestamp()")

    team, user, now = await db.transaction(make)
    holder = SessionHolder(
        user_id=user, email="ada@example.com", name="Ada", is_admin=False, team_id=team, role="owner"
    )
    token = SessionTokens(settings).issue(holder, now)
    return Stage(settings=settings, team=team, user=user, key=key.text, token=token, sandbox=sandbox)


class Known:
    """An authenticator that asks nobody."""

    def __init__(self, *_: object) -> None:
        team, user = UUID(os.environ["BENCH_TEAM"]), UUID(os.environ["BENCH_USER"])
        now = datetime.now(UTC)
        self._key = Principal(team_id=team, actor_type="api_key", actor_id=user, actor_name="ci")
        self._user = User(
            id=user, email="ada@example.com", name="Ada", team_id=team, role="owner",
            session=Session(id=user, issued_at=now, expires_at=now),
        )  # fmt: skip

    async def api_key(self, _key: str) -> Principal:
        return self._key

    async def session(self, _token: str) -> User:
        return self._user


def serve(kind: str) -> None:
    """The control plane, in a process of its own."""
    if kind == "known":
        control.Authenticator = Known  # type: ignore[assignment,misc]
    settings = config.load(os.environ)
    configure_logs(level=settings.log_level, json=settings.log_json)
    control.run(settings)


@contextmanager
def server(stage: Stage, kind: str, directory: Path):
    """(port, pid) of a control plane that answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    values = {
        "CAPSULE_DATABASE_URL": stage.settings.database_url,
        "CAPSULE_SECRET_KEY": stage.settings.secret_key,
        "CAPSULE_BIND": f"127.0.0.1:{port}",
        "CAPSULE_LOG_JSON": "true",
        "BENCH_TEAM": str(stage.team),
        "BENCH_USER": str(stage.user),
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CAPSULE_")}
    log = directory / f"{kind}.log"
    with log.open("wb") as out:
        command = [sys.executable, __file__, "--serve", kind]
        process = subprocess.Popen(command, env={**environment, **values}, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text()[-4000:])
            time.sleep(0.05)
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False).is_success
    except httpx.TransportError:
        return False


def measure_requests(stage: Stage) -> None:
    """Requests a second, p99 and processor time, each beside the baseline of the same rounds."""
    path = f"/v1/sandboxes/sb-{stage.sandbox}"
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="capsule-bench-")))
        asking = stack.enter_context(server(stage, "asking", directory))
        known = stack.enter_context(server(stage, "known", directory))
        key = request(path, X_API_Key=stage.key)
        token = request(path, Authorization=f"Bearer {stage.token}")
        kinds = {"not asked for": (known, key), "API key": (asking, key), "session's token": (asking, token)}
        for (port, pid), sent in kinds.values():
            load(port, pid, sent, clients=4, seconds=1.0, into=Sample())
        for clients in CLIENTS:
            samples = {name: Sample() for name in kinds}
            for turn in range(ROUNDS):
                order = list(kinds.items())[:: (1, -1)[turn % 2]]  # nobody is always first, or always last
                for name, ((port, pid), sent) in order:
                    load(port, pid, sent, clients=clients, seconds=SECONDS, into=samples[name])
            _print(clients, samples)


def _print(clients: int, samples: dict[str, Sample]) -> None:
    base = next(iter(samples.values()))
    for name, sample in samples.items():
        title = f"GET a sandbox, {clients:>2} clients, {name}"
        what = "not asked for" if sample is not base else ""
        show(f"{title}", sample.rate, "/s", base.rate if what else None, what)
        show(f"{title}: p99", sample.p99 * 1000, "ms", base.p99 * 1000 if what else None, what)
        show(f"{title}: processor time", sample.cost * 1e6, "us", base.cost * 1e6 if what else None, what)
        if what:
            show("  authentication, of the whole request", 1 - sample.rate / base.rate, "", goal=SHARE)
            show("  authentication, of its processor time", 1 - base.cost / sample.cost, "", goal=SHARE)


async def measure_parts(db: Database, stage: Stage) -> None:
    """Where it goes: one thing at a time, in this process."""
    tokens = SessionTokens(stage.settings)
    claims = tokens.check(stage.token)
    holder = partial(
        sessions.holder,
        user_id=claims.user_id, jti=claims.session_id, issued_at=claims.issued_at, team_id=claims.team_id,
    )  # fmt: skip

    async def nothing(_connection: object) -> None:
        return

    async def crossing(work):
        seconds = []
        for _ in range(CALLS):
            began = time.perf_counter()
            await db.run(work)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds) * 1e6

    base = await crossing(nothing)
    show("  to the database's thread and back", base, "us")
    for name, work in (
        ("with an empty query", lambda connection: connection.fetchval("select 1")),
        ("with the query for a key", lambda connection: keys.by_hash(connection, digest(stage.key))),
        ("with the query for a session", holder),
        ("with the handler's own query", lambda connection: sandboxes.get(connection, stage.team, stage.sandbox)),
    ):
        show(f"  {name}", await crossing(work), "us", base, "there and back")
    for name, work in (
        ("key: form and hash", lambda: digest(canonical(stage.key) or "")),
        ("token: signature and claims", lambda: tokens.check(stage.token)),
    ):
        began = time.perf_counter()
        for _ in range(CALLS):
            work()
        show(f"  {name}", (time.perf_counter() - began) / CALLS * 1e6, "us")


async def main() -> None:
    """All of it, in order."""
    async with database() as dsn, open_database(dsn, max_size=2) as db:
        await migrate(db)
        stage = await fill(db, dsn)
        await trio.to_thread.run_sync(measure_requests, stage)
        await measure_parts(db, stage)
        await measure_pages(db, stage.settings)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        trio.run(main)
