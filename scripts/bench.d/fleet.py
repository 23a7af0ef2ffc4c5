"""What a fleet costs its control plane, and how that grows from 10 to 100 hosts with 100 sandboxes each.

One process is the control plane, as it is served; another one is all hosts: the daemon's own parts over drivers that
only pretend, each host with its certificate and its TLS port. Figures are of the control plane. The goal: ten times the
hosts cost ten times as much, not more.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import httpx
import msgspec
import trio
from closed_loop import Sample, load, processor_seconds, request
from stage import database, show

sys.path.insert(0, str(Path(__file__).parents[2]))

from agent.actor.logs import configure_logs
from agent.actor.tls import serve_tls
from agent.enrol.identity import server_ssl_context
from agent.enrol.registration import Capacity, ControlPlane
from agent.net.fake import FakeSlotBackend
from agent.sandboxes.first_records import first_record
from agent.sandboxes.made import spec
from agent.sandboxes.parts import HostParts
from agent.sandboxes.records import ProcessRecord
from agent.storage.fake import FakeOverlays
from agent.vmm.fake import FakeVmDriver
from agent.wire.calls import CreateSandbox
from capsule import config, control
from capsule.db.migrate import migrate
from capsule.db.pool import open_database
from capsule.db.queries import teams, users
from capsule.hosts.authority import load_authority
from capsule.hosts.registration import HostEnrolment
from capsule.scheduler.placement import Overcommit, Size, Wish
from capsule.scheduler.scheduler import Scheduler, fleet_reader
from tests.fixtures.daemons import Daemon, DaemonHost
from tests.fixtures.threads import without_threads

FLEETS = (10, 100)
SANDBOXES = 100
ROUNDS = 5
FIRST_PORT = 20_000
MEMORY = Path("/dev/shm")  # noqa: S108 - nothing of this is to be synced to a disk
PATCH = SimpleNamespace(setattr=setattr)
DECIDE_SECONDS, BEAT_SECONDS = 4.0, 1.0
BEATERS, BEAT_ROUNDS, ASKERS = 8, 8, 32


# the process of the hosts


def run_hosts() -> None:
    """Read who is to be on standard input, say `ready`, then live until killed."""
    orders = json.loads(sys.stdin.readline())
    without_threads(PATCH)  # ten thousand sandboxes are made one file after the other; threads would only cost
    trio.run(_run_hosts, orders)


async def _run_hosts(orders: dict) -> None:
    async with trio.open_nursery() as nursery, ControlPlane(orders["url"]) as control_plane:
        lives = []
        for number, token in enumerate(orders["tokens"]):
            host = DaemonHost(Path(orders["directory"]) / str(number))
            lives.append(
                await _join(host, orders["sandboxes"][number], FIRST_PORT + number, token, control_plane, nursery)
            )
        print(
            json.dumps([{"id": one.credentials.host_id, "token": one.credentials.token} for one in lives]), flush=True
        )
        print("ready", flush=True)
        await trio.sleep_forever()


async def _join(
    host: DaemonHost, sandboxes: list[str], port: int, token: str, control_plane: ControlPlane, nursery: trio.Nursery
) -> Daemon:
    """Register, then adopt sandboxes that run there since before our time, then serve."""
    capacity = Capacity(arch="x86_64", cpu_cores=64, memory_mb=host.memory_mb, disk_gb=10_000)
    credentials = await control_plane.register(token, f"127.0.0.1:{port}", capacity)
    life = Daemon(host, control_plane, credentials)
    for slot, name in enumerate(sandboxes, 1):
        await _leave_running(host, life.parts, name, slot)
    nursery.start_soon(life.run)
    await life.serving.wait()
    context = server_ssl_context(credentials)

    async def serve(stream):
        life.accept(stream)
        await trio.sleep_forever()

    await nursery.start(partial(serve_tls, serve, host="127.0.0.1", port=port, context=context))
    return life


async def _leave_running(host: DaemonHost, parts: HostParts, name: str, slot: int) -> None:
    """What an earlier agent would have left of a sandbox: its VM, its slot, its disk, its record."""
    request = CreateSandbox(sandbox_id=name, template="minimal", vcpus=1, memory_mb=512, hostname="sb")
    record = msgspec.structs.replace(first_record(parts, request), phase="running", slot=slot)
    parts.state.save(record)
    await FakeSlotBackend.create(host.slots, slot)
    machine = spec(parts, record, tap_fd=-1)
    await FakeOverlays.create(host.overlays, machine.base, machine.disk, record.disk_mb)
    vm = await FakeVmDriver.boot(host.vms, machine)
    process = ProcessRecord(vm.process.pid, vm.process.start_time)
    parts.state.save(msgspec.structs.replace(record, process=process, started_at=time.time()))


# the process of the control plane


def run_control_plane() -> None:
    """As it is served, and with a round on demand: a line on standard input, its seconds on standard output."""
    settings = config.load(os.environ)
    configure_logs(level="error", json=True)
    monitors = []
    made = control.Monitor

    def monitor(*args, **options):
        monitors.append(made(*args, **options))
        return monitors[-1]

    control.Monitor = monitor  # type: ignore[assignment,misc]
    serve = control._serve  # noqa: SLF001

    async def serve_and_answer(*args):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer_rounds, monitors)
            await serve(*args)
            nursery.cancel_scope.cancel()

    control._serve = serve_and_answer  # noqa: SLF001
    control.run(settings)


async def _answer_rounds(monitors: list) -> None:
    lines = trio.lowlevel.FdStream(os.dup(0))
    while await lines.receive_some(100):
        followers = [follower for _, follower in monitors[0]._followers.values()]  # noqa: SLF001
        began, used = time.perf_counter(), time.process_time()
        async with trio.open_nursery() as nursery:
            for follower in followers:
                nursery.start_soon(follower._reconcile, nursery)  # noqa: SLF001
        figures = [len(followers), time.perf_counter() - began, time.process_time() - used]
        print(json.dumps(figures), flush=True)


@contextmanager
def process(kind: str, **options):
    """This file again, as that."""
    command = [sys.executable, __file__, f"--{kind}"]
    log = tempfile.TemporaryFile()  # noqa: SIM115 - read when it fails
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, **options)
    try:
        yield started
    except BaseException:
        log.seek(0)
        sys.stderr.write(log.read().decode(errors="replace")[-4000:])
        raise
    finally:
        started.send_signal(signal.SIGKILL if kind == "hosts" else signal.SIGTERM)
        started.wait(60)


def say(to: subprocess.Popen, line: str) -> None:
    """One line."""
    to.stdin.write(line + "\n")
    to.stdin.flush()


# what is measured


async def prepare(db, settings, count):
    """Tokens for the hosts, ids of their sandboxes, and a team for those."""
    enrolment = HostEnrolment(db, await load_authority(db, settings), settings)
    tokens = [(await enrolment.create_host()).registration_token for _ in range(count)]
    names = [[str(uuid4()) for _ in range(SANDBOXES)] for _ in range(count)]

    async def make(tx):
        user = await users.insert(tx, email="ada@example.com", name="Ada")
        return (await teams.insert(tx, name="Ada's Team", owner_id=user.id, is_default=True)).id

    return tokens, names, await db.transaction(make)


async def write_rows(db, team, hosts, names):
    """A row for each sandbox, on its way until its host lists it."""

    async def write(tx):
        for host, ones in zip(hosts, names, strict=True):
            ids = [UUID(one) for one in ones]
            await tx.execute(
                """insert into sandboxes (id, team_id, template, vcpus, memory_mb, disk_mb, transition_deadline)
                   select unnest($1::uuid[]), $2, 'minimal', 1, 512, 1024, now() + interval '1 hour'""",
                ids,
                team,
            )
            await tx.execute(
                """update sandboxes set status = 'starting', generation = 2, host_id = $2 where id = any($1)""",
                ids,
                UUID(host["id"].removeprefix("host-")),
            )

    await db.transaction(write)


async def until(db, statement, wanted, seconds=300):
    """Seconds until the statement says so."""
    began = time.perf_counter()
    while (found := await db.run(lambda connection: connection.fetchval(statement))) != wanted:
        if time.perf_counter() - began > seconds:
            sys.exit(f"{statement}: {found}, not {wanted}")
        await trio.sleep(0.1)
    return time.perf_counter() - began


async def decisions(db, seconds):
    """Placements a second, of many askers at once."""
    scheduler, made = Scheduler(fleet_reader(db, Overcommit(vcpus=8, disk=4))), 0

    async def ask():
        nonlocal made
        while True:
            async with scheduler.reserve(Wish(size=Size(vcpus=1, memory_mb=512, disk_mb=1024))):
                made += 1

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            await nursery.start(scheduler.run)
            for _ in range(ASKERS):
                nursery.start_soon(ask)
    return made / seconds


def heartbeats(port, hosts, pid):
    """A second, through HTTP, of clients that are a host each; and the processor time of one."""
    sample = Sample()
    sent = [
        request(f"/v1/hosts/{host['id']}/heartbeat", method="POST", X_Host_Token=host["token"], Content_Length="0")
        for host in hosts[:BEATERS]
    ]
    for _ in range(BEAT_ROUNDS):
        load(port, pid, sent, clients=len(sent), seconds=BEAT_SECONDS, into=sample)
    return sample.rate, sample.cost


def memory_mib(pid: int) -> float:
    """What is resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def measure(count: int) -> dict[str, float]:
    """One fleet, from nothing."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with database() as dsn, open_database(dsn, max_size=8) as db:
        await migrate(db)
        settings = config.Settings(database_url=dsn, secret_key=secrets.token_hex(32), bind=f"127.0.0.1:{port}")
        values = {
            "CAPSULE_DATABASE_URL": dsn,
            "CAPSULE_SECRET_KEY": settings.secret_key,
            "CAPSULE_BIND": settings.bind,
        }
        tokens, names, team = await prepare(db, settings, count)
        directory = MEMORY if MEMORY.is_dir() else None
        with (
            tempfile.TemporaryDirectory(prefix="capsule-fleet-", dir=directory) as root,
            process("control-plane", env={**os.environ, **values}) as plane,
            process("hosts") as fleet,
        ):
            await wait_ready(settings.url, plane)
            empty = memory_mib(plane.pid)
            orders = {"url": settings.url, "tokens": tokens, "sandboxes": names, "directory": root}
            say(fleet, json.dumps(orders))
            hosts = json.loads(await trio.to_thread.run_sync(fleet.stdout.readline))
            await write_rows(db, team, hosts, names)
            await until(db, "select count(*) from hosts where status = 'online'", count)
            await trio.to_thread.run_sync(fleet.stdout.readline)  # it is ready
            await until(db, "select count(*) from sandboxes where status = 'running'", count * SANDBOXES)
            return await figures(db, port, hosts, plane, empty)


async def figures(db, port, hosts, plane, empty):
    """Of a fleet that is at peace."""
    rounds = []
    for _ in range(ROUNDS):
        say(plane, "round")
        followed, seconds, processor = json.loads(await trio.to_thread.run_sync(plane.stdout.readline))
        if followed != len(hosts):
            sys.exit(f"the monitor follows {followed} of {len(hosts)} hosts")
        rounds.append((seconds, processor))
        await trio.sleep(0.5)
    idle = processor_seconds(plane.pid)
    await trio.sleep(10)
    idle = (processor_seconds(plane.pid) - idle) / 10
    beats, cost = await trio.to_thread.run_sync(heartbeats, port, hosts, plane.pid)
    return {
        "round": statistics.median(seconds for seconds, _ in rounds),
        "round_processor": statistics.median(processor for _, processor in rounds),
        "idle": idle,
        "decisions": await decisions(db, DECIDE_SECONDS),
        "beats": beats,
        "beat_processor": cost,
        "memory": memory_mib(plane.pid),
        "empty": empty,
    }


async def wait_ready(url: str, plane: subprocess.Popen) -> None:
    """Until it answers."""
    with trio.fail_after(60):
        while plane.poll() is None:
            try:
                if httpx.get(f"{url}/ready", trust_env=False).is_success:
                    return
            except httpx.TransportError:
                await trio.sleep(0.1)
    raise RuntimeError("the control plane has ended")


def report(count: int, one: dict[str, float], base: dict[str, float] | None) -> None:
    """The figures of one fleet, beside those of the small one."""
    linear = "the small fleet's, for each host"

    def growing(name: str, key: str, unit: str, scale: float = 1.0, goal: float = 1.5) -> None:
        expected = None if base is None else base[key] * scale * count / base["hosts"]
        show(name, one[key] * scale, unit, expected, linear, goal=None if base is None else goal)

    def steady(name: str, key: str, unit: str, scale: float = 1.0) -> None:
        show(name, one[key] * scale, unit, None if base is None else base[key] * scale, "the small fleet's")

    print(f"{count} hosts with {SANDBOXES} sandboxes each", flush=True)
    growing("  monitor: every host listed and compared", "round", "ms", 1000)
    growing("  monitor: processor time of that", "round_processor", "ms", 1000)
    growing("  processor time of a fleet at peace, a second", "idle", "ms", 1000)
    steady("  scheduler: decisions", "decisions", "/s")
    steady("  heartbeats through HTTP", "beats", "/s")
    steady("  processor time of one", "beat_processor", "us", 1e6)
    show("  memory of the control plane", one["memory"], "MiB")
    show("  beyond that of one without hosts", one["memory"] - one["empty"], "MiB")


def main(fleets: list[int]) -> None:
    """One after the other; those after the first beside it."""
    base = None
    for count in fleets:
        one = trio.run(measure, count)
        report(count, one, base)
        base = base or one | {"hosts": count}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--hosts"]:
            run_hosts()
        case ["--control-plane"]:
            run_control_plane()
        case fleets:
            main([int(one) for one in fleets] or list(FLEETS))
