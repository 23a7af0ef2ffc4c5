"""The control plane: its nursery tree in one screen.

serve
├─ signals              SIGTERM, SIGINT: stop accepting, drain, cancel; a hard deadline behind it all
├─ database             (service; closes last)
├─ host links           → link per host in use → peer
├─ scheduler            reservations
├─ operations           → task per create, destroy, pause, resume, fork, snapshot or removal of a host under way
├─ monitor              → keeper of the lease, follower per host, while it leads
└─ HTTP server          → task per connection
"""

from __future__ import annotations

import re
import signal
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog
import trio
from prometheus_client import CollectorRegistry

from agent.actor.settings import SettingsError
from agent.actor.watchdog import LoopWatchdog
from capsule.auth.authenticator import Authenticator
from capsule.auth.keys import ApiKeyAuthenticator
from capsule.auth.passwords import Passwords
from capsule.auth.rate_limits import RateLimits, rules_of
from capsule.auth.sessions import SessionAuthenticator, SessionTokens
from capsule.db.errors import DatabaseError, DatabaseUnavailable
from capsule.db.migrate import migrate
from capsule.db.pool import Database, open_database
from capsule.fleet.joining import Joiner
from capsule.fleet.removal import Remover
from capsule.fleet.service import Fleet
from capsule.gauges import FleetGauges
from capsule.hosts.authority import load_authority
from capsule.hosts.directory import Directory
from capsule.hosts.links import HostLinks, tls_dial
from capsule.hosts.registration import HostEnrolment
from capsule.hosts.tls import ClientContexts
from capsule.http.app import create_app
from capsule.http.people_ports import PeopleServices
from capsule.http.ports import Services
from capsule.http.server import serve as serve_http
from capsule.http.sockets.origins import OriginRule
from capsule.monitor.monitor import Monitor
from capsule.people.accounts import Accounts
from capsule.people.api_keys import ApiKeys
from capsule.people.audit import AuditTrail
from capsule.people.oauth import OAuth
from capsule.people.platform import Platform
from capsule.people.teams import Teams
from capsule.sandboxes.create import Creator
from capsule.sandboxes.destroy import Destroyer
from capsule.sandboxes.execs import Execs
from capsule.sandboxes.files import Files
from capsule.sandboxes.fork import Forker
from capsule.sandboxes.live import LiveProcesses
from capsule.sandboxes.operations import Operations
from capsule.sandboxes.pause import Pauser
from capsule.sandboxes.resume import Resumer
from capsule.sandboxes.rows import SandboxRows
from capsule.sandboxes.service import Sandboxes, Templates
from capsule.sandboxes.snapshots import Snapshots
from capsule.sandboxes.start import Starter
from capsule.sandboxes.streams import Streams
from capsule.sandboxes.transfers import Transfers
from capsule.scheduler.placement import STRATEGIES, Overcommit
from capsule.scheduler.scheduler import Scheduler, fleet_reader

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from capsule.config import Settings

log = structlog.get_logger()

HOST_FORM = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*)(:[0-9]{1,5})?")
POOL_SIZE = 16
HTTP_GRACE = 10.0
"""Seconds that requests get to finish after a stop request."""
DATABASE_PATIENCE = 60.0
"""Seconds that a starting control plane waits for its database."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""
    trio.run(serve, settings, instruments=[LoopWatchdog()])


async def serve(settings: Settings) -> None:
    """The control plane. Ends by a signal; raises what kept it from starting."""
    check_database_url(settings.database_url)
    rules_of(settings.rate_limits)
    stop = trio.Event()
    async with trio.open_nursery() as signals:
        await signals.start(_watch_signals, stop, settings.shutdown_timeout)
        log.info("control_plane_starting", bind=settings.bind)
        async with open_database(settings.database_url, max_size=POOL_SIZE) as db:
            if await _reached(db, stop):
                await _serve(settings, db, stop)
        signals.cancel_scope.cancel()
    log.info("control_plane_stopped")


def check_database_url(url: str) -> None:
    """SettingsError when `url` cannot be the address of a database. Nothing of it is quoted: it has a password."""
    parts = urlsplit(url)
    hosts = parts.netloc.rpartition("@")[2].split(",")
    if parts.scheme not in {"postgresql", "postgres"} or not all(HOST_FORM.fullmatch(host) for host in hosts):
        raise SettingsError("CAPSULE_DATABASE_URL must be like postgresql://user:password@host:5432/capsule")


async def wait_for_database(db: Database, patience: float | None = None) -> None:
    """Until it answers. DatabaseUnavailable after `patience` seconds (DATABASE_PATIENCE unless given); SettingsError
    when it refuses us."""
    try:
        await db.wait_available(timeout=DATABASE_PATIENCE if patience is None else patience)
    except DatabaseError:
        raise
    except Exception as err:  # what it is called is the driver's business: a password, a role, a database's name
        raise SettingsError(f"the database of CAPSULE_DATABASE_URL refuses us: {err}") from err


async def _reached(db: Database, stop: trio.Event) -> bool:
    """Wait for the database and migrate it; False when we were told to stop before that."""
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        await wait_for_database(db)
        await migrate(db)
        nursery.cancel_scope.cancel()
    return not stop.is_set()


async def _serve(settings: Settings, db: Database, stop: trio.Event) -> None:
    authority = await load_authority(db, settings)
    links = HostLinks(Directory(db), tls_dial(ClientContexts(authority)), settings)
    overcommit = Overcommit(
        vcpus=settings.vcpu_overcommit, memory=settings.memory_overcommit, disk=settings.disk_overcommit
    )
    scheduler = Scheduler(fleet_reader(db, overcommit), strategy=STRATEGIES[settings.scheduler])
    operations = Operations()
    sandboxes = _sandboxes(settings, SandboxRows(db), links, scheduler, operations)
    monitor = Monitor(db, links, settings, pause=sandboxes.pauser.pause_by_system)
    enrolment = HostEnrolment(db, authority, settings, forget=_on_registration(links, monitor))
    registry = CollectorRegistry()
    FleetGauges(db, links, operations, monitor).register(registry)
    services = Services(
        authenticator=Authenticator(ApiKeyAuthenticator(db), SessionAuthenticator(db, SessionTokens(settings))),
        sandboxes=sandboxes,
        streams=_streams(sandboxes),
        templates=_templates(sandboxes),
        hosts=enrolment,
        fleet=_fleet(sandboxes, enrolment),
        people=_people(settings, db),
        ready=partial(_ready, db),
    )
    app = create_app(
        services,
        registry=registry,
        version=version("capsule"),
        spool_dir=Path(settings.spool),
        trusted_proxies=settings.trusted_networks,
        origins=OriginRule.of(settings.origins, same_host=not settings.public_url),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(links.run)
        await nursery.start(scheduler.run)
        await nursery.start(operations.run)
        nursery.start_soon(monitor.run)
        async with trio.open_nursery() as http:
            await http.start(partial(serve_http, app, settings.bind_address, shutdown=stop, grace=HTTP_GRACE))
            log.info("control_plane_serving", url=settings.url)
        await operations.drain()
        nursery.cancel_scope.cancel()


def _sandboxes(
    settings: Settings, rows: SandboxRows, links: HostLinks, scheduler: Scheduler, operations: Operations
) -> Sandboxes:
    starter = Starter(rows=rows, links=links, settings=settings)
    return Sandboxes(
        rows=rows,
        creator=Creator(rows=rows, starter=starter, scheduler=scheduler, operations=operations, settings=settings),
        destroyer=Destroyer(rows=rows, links=links, operations=operations, settings=settings),
        pauser=Pauser(rows=rows, links=links, operations=operations, settings=settings),
        resumer=Resumer(rows=rows, links=links, scheduler=scheduler, operations=operations, settings=settings),
        forker=Forker(
            rows=rows, links=links, starter=starter, scheduler=scheduler, operations=operations, settings=settings
        ),
        execs=Execs(links=links),
        files=Files(links=links),
    )


def _streams(sandboxes: Sandboxes) -> Streams:
    """Beside the sandboxes, with the same parts."""
    links = sandboxes.execs.links
    return Streams(rows=sandboxes.rows, processes=LiveProcesses(links=links), transfers=Transfers(links=links))


def _templates(sandboxes: Sandboxes) -> Templates:
    """Beside the sandboxes, with the same parts."""
    pauser = sandboxes.pauser
    snapshots = Snapshots(
        rows=pauser.rows, links=pauser.links, operations=pauser.operations, pauser=pauser, settings=pauser.settings
    )
    return Templates(rows=pauser.rows, snapshots=snapshots)


def _fleet(sandboxes: Sandboxes, enrolment: HostEnrolment) -> Fleet:
    """Beside the sandboxes, with the same parts."""
    destroyer = sandboxes.destroyer
    return Fleet(
        Joiner(db=destroyer.rows, tokens=enrolment, settings=destroyer.settings),
        Remover(
            rows=destroyer.rows,
            links=destroyer.links,
            operations=destroyer.operations,
            end=destroyer.finish,
        ),
    )


def _people(settings: Settings, db: Database) -> PeopleServices:
    limits = RateLimits(db, rules_of(settings.rate_limits))
    return PeopleServices(
        accounts=Accounts(db, settings, limits, Passwords(settings)),
        oauth=OAuth(db, settings, limits),
        teams=Teams(db, settings, limits),
        api_keys=ApiKeys(db, settings),
        audit=AuditTrail(db, settings),
        platform=Platform(db),
    )


def _on_registration(links: HostLinks, monitor: Monitor) -> Callable[[UUID], None]:
    """A host that registers gets a new link, and is followed at once."""

    def act(host: UUID) -> None:
        links.forget(host)
        monitor.nudge()

    return act


async def _ready(db: Database) -> bool:
    try:
        await db.ping()
    except DatabaseUnavailable:
        return False
    return True


async def _watch_signals(stop: trio.Event, hard: float, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("stop_requested", signal=signal.Signals(number).name)
            if not stop.is_set():  # a second signal must not buy time
                signal.setitimer(signal.ITIMER_REAL, hard)
            stop.set()
