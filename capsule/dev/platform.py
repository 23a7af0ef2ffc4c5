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
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from capsule import config, control
from capsule.db.embedded import PostgresHandle, run_postgres
from capsule.db.errors import DatabaseError
from capsule.db.migrate import migrate
from capsule.db.pool import Database, open_database
from capsule.dev import bootstrap, environments, files
from capsule.dev.banner import banner
from capsule.dev.program import Program
from capsule.dev.recorder import Ready, Recorder
from capsule.errors import CapsuleError
from capsule.hosts.authority import load_authority
from capsule.hosts.registration import HostEnrolment

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from capsule.config import Settings

log = structlog.get_logger()

AGENT_PATIENCE = 25.0
CONTROL_PATIENCE = 35.0
PURGE_PATIENCE = 60.0
POLL = 0.1
RETRY_PAUSE = 1.0


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
    stopping: bool = False
    programs: dict[str, Program] = field(default_factory=dict)

    async def run(self, stop: trio.Event) -> None:
        """Bring everything up, keep it up until `stop`, take it down."""
        await migrate(self.db)
        await self._make_key()
        recorder = Recorder(self.options.data, self.options.ready_file, pids=self._pids, ready=self._ready)
        await recorder.write()  # what an earlier run left is not true any more
        module = [sys.executable, "-m"]
        self._add("control", [*module, "capsule", "serve"], self._control_environment, recorder)
        self._add("agent", [*module, "agent", "serve"], self._agent_environment, recorder)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(recorder.run)
            for program in self.programs.values():
                nursery.start_soon(program.run)
            nursery.start_soon(self._announce, recorder)
            await stop.wait()
            await self._stop(recorder)
            nursery.cancel_scope.cancel()

    def _add(self, name: str, command: list[str], environment: bootstrap.EnvironmentMaker, recorder: Recorder) -> None:
        self.programs[name] = Program(name, command, environment, recorder.changed)

    async def _make_key(self) -> None:
        stored = files.read_secrets(self.options.data)
        self.api_key = await self.db.transaction(bootstrap.ensure_key, stored.get(environments.API_KEY))
        kept = {**stored, environments.API_KEY: self.api_key}
        await trio.to_thread.run_sync(files.write_secrets, self.options.data, kept)

    async def _control_environment(self) -> Mapping[str, str]:
        return environments.for_control_plane(self.environ)

    async def _agent_environment(self) -> Mapping[str, str]:
        """With a fresh one-time token when the agent has no credentials that this database knows."""
        while True:
            try:
                return {**environments.for_agent(self.environ), **await self._enrolment()}
            except (DatabaseError, CapsuleError) as err:
                log.warning("agent_waits_for_database", reason=str(err))
            await trio.sleep(RETRY_PAUSE)

    async def _enrolment(self) -> Mapping[str, str]:
        credentials = environments.credentials(self.environ)
        host = environments.host_of(credentials)
        if host is not None and await self.db.run(bootstrap.may_serve, host):
            return {}
        enrolment = HostEnrolment(self.db, await load_authority(self.db, self.settings), self.settings)
        remembered = environments.remembered_host(self.environ)
        host = await self.db.run(bootstrap.own_host, remembered)
        await self._settle_sandboxes(remembered, host)
        with suppress(FileNotFoundError):
            credentials.rename(credentials.with_suffix(".old"))
        if host is None:  # one, however often its agent has to start until it is registered: it is found again
            token = (await enrolment.create_host(provider=bootstrap.PROVIDER)).registration_token
        else:
            token = await enrolment.new_token(host)
        await self._wait_for_control_plane()
        return {"CAPSULE_AGENT_URL": self.settings.url, "CAPSULE_AGENT_TOKEN": token}

    async def _settle_sandboxes(self, remembered: UUID | None, host: UUID | None) -> None:
        """An agent that has some becomes no other host than theirs: those that this database does not know go."""
        if not environments.has_sandboxes(self.environ):
            return
        if host is None or remembered not in {None, host}:
            log.warning("sandboxes_of_another_database_removed")
            await self._purge()
        elif remembered is None:
            environments.host_id_file(self.environ).write_text(f"host-{host}\n")

    async def _wait_for_control_plane(self) -> None:
        """An agent that registers needs an answer."""
        host, port = self.settings.bind_address
        while True:
            with suppress(OSError):
                stream = await trio.open_tcp_stream(host, port)
                await trio.aclose_forcefully(stream)
                return
            await trio.sleep(POLL)

    async def _announce(self, recorder: Recorder) -> None:
        """Once a sandbox can be created: say so."""
        since = datetime.now(UTC)  # a host that was online when we were stopped is not yet online again
        await self._wait_for_control_plane()
        while True:
            with suppress(DatabaseError):
                if await self.db.run(bootstrap.usable, since):
                    break
            await trio.sleep(POLL)
        self.ready = not self.stopping
        await recorder.write()
        print(banner(self.settings.url, self.api_key), flush=True)  # noqa: T201 - the command's output

    def _pids(self) -> list[int]:
        return [program.pid for program in self.programs.values() if program.pid]

    def _ready(self) -> Ready | None:
        if not self.ready:
            return None
        agent, control_plane = self.programs["agent"].pid, self.programs["control"].pid
        postgres = self.postgres.pid if self.postgres is not None else None
        return Ready(
            url=self.settings.url,
            api_key=self.api_key,
            agent_pids=[agent] if agent else [],
            control_pids=[control_plane] if control_plane else [],
            postgres_pids=[postgres] if postgres else [],
        )

    async def _stop(self, recorder: Recorder) -> None:
        log.info("platform_stopping")
        self.stopping, self.ready = True, False
        await recorder.write()
        await self.programs["agent"].stop(AGENT_PATIENCE)
        await self._purge()
        await self.programs["control"].stop(CONTROL_PATIENCE)
        host = environments.remembered_host(self.environ)
        if host is not None:
            with suppress(DatabaseError):
                await self.db.transaction(bootstrap.end_sandboxes, host)

    async def _purge(self) -> None:
        environ = environments.for_agent(self.environ)
        with trio.move_on_after(PURGE_PATIENCE):
            await trio.run_process(
                [sys.executable, "-m", "agent", "purge", "--yes"], env=environ, check=False, start_new_session=True
            )


async def run(options: Options) -> None:
    """`capsule dev`, until SIGINT or SIGTERM."""
    files.lock(options.data)
    if options.ready_file is not None:
        options.ready_file.parent.mkdir(parents=True, exist_ok=True)
    ended = await trio.to_thread.run_sync(files.end_remembered_programs, options.data)
    if ended:
        log.warning("earlier_programs_ended", count=ended)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, stop)
        environ = environments.base(options.data)
        postgres: PostgresHandle | None = None
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
        control.check_database_url(settings.database_url)
        async with open_database(settings.database_url, max_size=2) as db:
            await control.wait_for_database(db)
            await Platform(options, environ, settings, postgres, db).run(stop)
        nursery.cancel_scope.cancel()
    (options.data / "programs.json").unlink(missing_ok=True)
    log.info("platform_stopped")


async def _watch_signals(stop: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            if stop.is_set():
                log.error("stopped_hard", signal=signal.Signals(number).name)
                os._exit(1)
            stop.set()
