"""Everything on one machine: PostgreSQL, one control plane, one agent; for trying it out and for a single server.

    run
    ├─ signals
    ├─ embedded PostgreSQL        (unless CAPSULE_DATABASE_URL is set)
    ├─ program: control plane
    ├─ program: agent
    └─ announcer                  ready file and banner, once a sandbox can be created

Stopping goes the other way: agent, its VMs (`capsule-agent purge`), control plane, PostgreSQL.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec
import structlog
import trio

from agent.actor.settings import environment
from capsule import config
from capsule.db.embedded import PostgresHandle, run_postgres
from capsule.db.errors import DatabaseError
from capsule.db.migrate import migrate
from capsule.db.pool import Database, open_database
from capsule.dev import bootstrap, files
from capsule.dev.banner import banner
from capsule.dev.program import Program
from capsule.hosts.authority import load_authority
from capsule.hosts.registration import HostEnrolment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from capsule.config import Settings

log = structlog.get_logger()

AGENT_PATIENCE = 25.0
CONTROL_PATIENCE = 35.0
PURGE_PATIENCE = 60.0
POLL = 0.1


class Ready(msgspec.Struct, frozen=True):
    """The ready file."""

    url: str
    api_key: str
    agent_pids: list[int]
    control_pids: list[int]
    postgres_pids: list[int]


@dataclass(kw_only=True)
class Options:
    """What the command line says."""

    data: Path
    ready_file: Path | None = None


@dataclass
class Platform:
    """One `capsule dev`; see the module's docstring."""

    options: Options
    environ: dict[str, str]
    settings: Settings
    postgres: PostgresHandle | None
    db: Database
    api_key: str = ""
    ready: bool = False
    programs: dict[str, Program] = field(default_factory=dict)

    async def run(self, stop: trio.Event) -> None:
        """Bring everything up, keep it up until `stop`, take it down."""
        await migrate(self.db)
        await self._make_key()
        module = [sys.executable, "-m"]
        self._add("control", [*module, "capsule", "serve"], self._control_environment)
        self._add("agent", [*module, "agent", "serve"], self._agent_environment)
        async with trio.open_nursery() as nursery:
            for program in self.programs.values():
                nursery.start_soon(program.run)
            nursery.start_soon(self._announce)
            await stop.wait()
            await self._stop()
            nursery.cancel_scope.cancel()

    def _add(self, name: str, command: list[str], make_environment: bootstrap.EnvironmentMaker) -> None:
        self.programs[name] = Program(name, command, make_environment, self._programs_changed)

    async def _make_key(self) -> None:
        stored = files.read_secrets(self.options.data)
        self.api_key = await self.db.transaction(bootstrap.ensure_key, stored.get("CAPSULE_API_KEY"))
        files.write_secrets(self.options.data, {**stored, "CAPSULE_API_KEY": self.api_key})

    async def _control_environment(self) -> Mapping[str, str]:
        return self.environ

    async def _agent_environment(self) -> Mapping[str, str]:
        """With a fresh one-time token when the agent has no credentials that this database knows."""
        credentials = _agent_state(self.environ) / "credentials.json"
        host = _host_of(credentials)
        known = host is not None and await self.db.run(bootstrap.host_exists, host)
        if known:
            return self.environ
        with suppress(FileNotFoundError):
            credentials.rename(credentials.with_suffix(".old"))
        enrolment = HostEnrolment(self.db, await load_authority(self.db, self.settings), self.settings)
        new = await enrolment.create_host(provider="capsule dev")
        await self._wait_for_control_plane()
        return {
            **self.environ,
            "CAPSULE_AGENT_URL": self.settings.url,
            "CAPSULE_AGENT_TOKEN": new.registration_token,
        }

    async def _wait_for_control_plane(self) -> None:
        """An agent that registers needs an answer."""
        host, port = self.settings.bind_address
        while True:
            with suppress(OSError):
                stream = await trio.open_tcp_stream(host, port)
                await trio.aclose_forcefully(stream)
                return
            await trio.sleep(POLL)

    async def _announce(self) -> None:
        """Once a sandbox can be created: say so."""
        await self._wait_for_control_plane()
        while True:
            with suppress(DatabaseError):
                if await self.db.run(bootstrap.usable):
                    break
            await trio.sleep(POLL)
        self.ready = True
        self._programs_changed()
        print(banner(self.settings.url, self.api_key), flush=True)  # noqa: T201 - the command's output

    def _programs_changed(self) -> None:
        pids = {name: program.pid for name, program in self.programs.items()}
        files.remember_programs(self.options.data, [pid for pid in pids.values() if pid])
        if not self.ready or self.options.ready_file is None:
            return
        ready = Ready(
            url=self.settings.url,
            api_key=self.api_key,
            agent_pids=[pid for pid in [pids["agent"]] if pid],
            control_pids=[pid for pid in [pids["control"]] if pid],
            postgres_pids=[pid for pid in [self.postgres and self.postgres.pid] if pid],
        )
        files.replace(self.options.ready_file, msgspec.json.format(msgspec.json.encode(ready)) + b"\n")

    async def _stop(self) -> None:
        log.info("platform_stopping")
        if self.options.ready_file is not None:
            self.options.ready_file.unlink(missing_ok=True)
        await self.programs["agent"].stop(AGENT_PATIENCE)
        await self._purge()
        await self.programs["control"].stop(CONTROL_PATIENCE)
        host = _host_of(_agent_state(self.environ) / "credentials.json")
        if host is not None:
            with suppress(DatabaseError):
                await self.db.transaction(bootstrap.end_sandboxes, host)

    async def _purge(self) -> None:
        with trio.move_on_after(PURGE_PATIENCE):
            await trio.run_process(
                [sys.executable, "-m", "agent", "purge", "--yes"], env=self.environ, check=False, start_new_session=True
            )


async def run(options: Options) -> None:
    """`capsule dev`, until SIGINT or SIGTERM."""
    files.lock(options.data)
    ended = await trio.to_thread.run_sync(files.end_remembered_programs, options.data)
    if ended:
        log.warning("earlier_programs_ended", count=ended)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, stop)
        postgres: PostgresHandle | None = None
        environ = _environment(options.data)
        if not environ.get("CAPSULE_DATABASE_URL"):
            postgres = await nursery.start(
                partial(
                    run_postgres,
                    options.data / "postgres",
                    runtime=options.data / "run",
                    cache=options.data / "cache",
                )
            )
            environ["CAPSULE_DATABASE_URL"] = postgres.dsn
        settings = config.load(environ)
        async with open_database(settings.database_url, max_size=2) as db:
            await db.wait_available(timeout=60)
            await Platform(options, environ, settings, postgres, db).run(stop)
        nursery.cancel_scope.cancel()
    (options.data / "programs.json").unlink(missing_ok=True)
    log.info("platform_stopped")


def _environment(data: Path) -> dict[str, str]:
    """What the programs get: ours over `.env`, over what `capsule dev` decides."""
    decided = {
        "CAPSULE_AGENT_STATE": str(data / "agent"),
        "PYTHONUNBUFFERED": "1",
    }
    return {**decided, **files.read_secrets(data), **environment(Path(".env"))}


def _agent_state(environ: Mapping[str, str]) -> Path:
    return Path(environ["CAPSULE_AGENT_STATE"])


def _host_of(credentials: Path) -> UUID | None:
    """The host that the agent's credentials are for; None when there are none that can be read."""
    try:
        stored = msgspec.json.decode(credentials.read_bytes())
        return UUID(str(stored["host_id"]).removeprefix("host-"))
    except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError):
        return None


async def _watch_signals(stop: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            if stop.is_set():
                log.error("stopped_hard", signal=signal.Signals(number).name)
                os._exit(1)
            stop.set()
