"""A PostgreSQL of our own for `capsule dev`, behind a unix socket: no TCP, no password, no account in it but ours."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, PIPE
from urllib.parse import quote

import structlog
import trio

from capsule.db.cluster import (
    DATABASE,
    USER,
    as_account,
    data_version,
    end_leftovers,
    initialise,
    locked,
    private_directory,
)
from capsule.db.errors import PostgresFailed, PostgresPathUnusable
from capsule.db.programs import Account, Programs, find_programs, server_account, within_reach

log = structlog.get_logger()

MAX_SOCKET_PATH = 107
"""Bytes of a unix socket's path; the kernel's structure has 108, one of them the final zero."""

START_TIMEOUT = 60.0
"""Seconds until a server answers, recovery after a crash included."""

STOP_PATIENCE = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 3.0), (signal.SIGKILL, 3.0))
"""How the server is stopped: signal (fast shutdown, immediate shutdown, the end), then seconds to wait."""

RESTART_FIRST, RESTART_MOST = 0.1, 5.0
"""Seconds before a server that died is started again; doubled each time."""

STEADY = 30.0
"""Seconds of service after which the next death counts as the first again."""

LAST_WORDS = 0.5
"""Seconds to read what a server that died still said."""

LOG_LINES = 20
"""Lines of the server's log kept for the message of a failure."""

MAX_LOG_LINE = 2000
"""Bytes of a line that are logged."""


class PostgresHandle:
    """What others know of the embedded server. `dsn` stays the same over restarts."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.pid: int | None = None
        """The server's process now; None while there is none."""
        self.restarts = 0


def dsn_of(runtime: Path) -> str:
    """Where a server with this runtime directory is, or would be."""
    return f"postgresql://{USER}@/{DATABASE}?host={quote(str(runtime.absolute()), safe='')}"


async def run_postgres(
    data: Path,
    *,
    runtime: Path,
    cache: Path,
    binaries: Path | None = None,
    durable: bool = True,
    task_status: trio.TaskStatus[PostgresHandle] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep a server running on `data` until cancelled; reports its handle when it answers for the first time.

    `runtime` gets the socket, `cache` a copy of the programs when their own place is closed to the server's user.
    `binaries`: the directory to take `postgres` from (default: CAPSULE_POSTGRES_BIN, else see `find_programs`).
    `durable=False` is for tests: a crash of the machine may lose everything, one of the server loses nothing.

    Owns: the server process, the lock on `data`. Owned by: the nursery it is started in. Emits: the handle.
    Dies when: cancelled (the server is shut down first, at most 16 s), or when the server cannot be started at all
    (EmbeddedPostgresError). A server that dies later is started again.
    """
    data, runtime, cache = _absolute(data), _absolute(runtime), _absolute(cache)
    if len(os.fsencode(runtime / ".s.PGSQL.5432")) > MAX_SOCKET_PATH:
        raise PostgresPathUnusable(f"{runtime} is too long for a socket; choose a shorter runtime directory")
    with locked(data):
        explicit = binaries or _from_environment()
        programs, account = await trio.to_thread.run_sync(_prepare, data, runtime, cache, explicit)
        if not (data / "PG_VERSION").exists():
            await initialise(programs, data, account, durable=durable)
        handle = PostgresHandle(dsn_of(runtime))
        command = _command(programs, data, runtime, durable=durable)
        await _Supervisor(command, data, account, handle, lambda: task_status.started(handle)).run()


def _absolute(path: Path) -> Path:
    return path.absolute()


def _from_environment() -> Path | None:
    place = os.environ.get("CAPSULE_POSTGRES_BIN")
    return Path(place) if place else None


def _prepare(data: Path, runtime: Path, cache: Path, explicit: Path | None) -> tuple[Programs, Account | None]:
    account = server_account(data)
    programs = within_reach(find_programs(explicit, major=data_version(data)), account, cache)
    private_directory(data, account)
    private_directory(runtime, account)
    return programs, account


def _command(programs: Programs, data: Path, runtime: Path, *, durable: bool) -> list[str]:
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": str(runtime),
        "unix_socket_permissions": "0700",
        # The log must not quote what users sent: no statements, no offending values.
        "log_min_error_statement": "panic",
        "log_error_verbosity": "terse",
        "log_line_prefix": "",
        "logging_collector": "off",
        # In the data directory, so that a server that is killed leaves nothing in /dev/shm.
        "dynamic_shared_memory_type": "mmap",
        **({} if durable else {"fsync": "off", "full_page_writes": "off"}),
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return [str(programs.directory / "postgres"), "-D", str(data), *options]


class _Supervisor:
    """Starts the server, follows its log, starts it again."""

    def __init__(
        self,
        command: list[str],
        data: Path,
        account: Account | None,
        handle: PostgresHandle,
        on_first_service: Callable[[], None],
    ) -> None:
        self._command = command
        self._data = data
        self._account = account
        self._handle = handle
        self._on_first_service = on_first_service
        self._served = False
        self._ready, self._log_ended = trio.Event(), trio.Event()
        self._last_lines: deque[str] = deque(maxlen=LOG_LINES)

    async def run(self) -> None:
        pause = RESTART_FIRST
        while True:
            await end_leftovers(self._data)
            began = trio.current_time()
            code = await self._serve()
            if not self._served:
                raise PostgresFailed(f"the server did not start (exit {code}): {' | '.join(self._last_lines)}")
            if trio.current_time() - began >= STEADY:
                pause = RESTART_FIRST
            log.warning("postgres_died", exit_code=code, restart_in=pause, last=list(self._last_lines)[-3:])
            await trio.sleep(pause)
            pause = min(pause * 2, RESTART_MOST)
            self._handle.restarts += 1

    async def _serve(self) -> int:
        """One life of the server; returns its exit code."""
        self._ready, self._log_ended = trio.Event(), trio.Event()
        self._last_lines.clear()
        process = await trio.lowlevel.open_process(
            self._command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, **as_account(self._account)
        )
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow_log, process)
                nursery.start_soon(self._await_readiness, process)
                code = await process.wait()
                with trio.move_on_after(LAST_WORDS):  # orphans of a killed server hold the pipe a little longer
                    await self._log_ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._handle.pid = None
            with trio.move_on_after(sum(patience for _, patience in STOP_PATIENCE), shield=True):
                await _stop(process)
        return code

    async def _await_readiness(self, process: trio.Process) -> None:
        with trio.move_on_after(START_TIMEOUT) as scope:
            await self._ready.wait()
        if scope.cancelled_caught:
            log.error("postgres_start_too_slow", seconds=START_TIMEOUT)
            process.kill()
            return
        self._handle.pid = process.pid
        log.info("postgres_ready", pid=process.pid, restarts=self._handle.restarts)
        if not self._served:
            self._served = True
            self._on_first_service()

    async def _follow_log(self, process: trio.Process) -> None:
        """Read for the server's whole life: a full pipe would stop it."""
        if process.stderr is None:
            raise AssertionError("stderr is a pipe")
        rest = b""
        async for chunk in process.stderr:
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-MAX_LOG_LINE:]
            for line in lines:
                self._note(line[:MAX_LOG_LINE].decode(errors="replace").strip())
        self._log_ended.set()

    def _note(self, line: str) -> None:
        self._last_lines.append(line)
        if "database system is ready to accept connections" in line:
            self._ready.set()
        log.debug("postgres_log", line=line)


async def _stop(process: trio.Process) -> None:
    for number, patience in STOP_PATIENCE:
        if process.returncode is None:
            process.send_signal(number)
        with trio.move_on_after(patience):
            await process.wait()
            break
    if process.stderr is not None:
        await process.stderr.aclose()
