"""The data directory of the embedded server: made once, locked while in use, cleared of what a crash left running."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog
import trio

from capsule.db.errors import PostgresFailed, PostgresInUse, PostgresPathUnusable
from capsule.db.programs import Account, Programs, reaches

log = structlog.get_logger()

USER = DATABASE = "capsule"

INIT_TIMEOUT = 120.0
"""Seconds for initdb, which writes 40 MB and syncs it."""

LEFTOVER_PATIENCE = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 3.0), (signal.SIGKILL, 2.0))
"""How servers left by a crash are ended: signal, then seconds to wait for the end. Backends whose server was killed
notice by themselves within moments, and only the last two signals go to them."""


@contextmanager
def locked(data: Path) -> Iterator[None]:
    """Hold `data` against other launchers; the kernel lets go when we die. Raises PostgresInUse."""
    data.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(data.parent / f".{data.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise PostgresInUse(f"{data} is in use by another launcher; stop that or choose another directory") from err
        yield
    finally:
        os.close(lock)


def as_account(account: Account | None) -> dict[str, Any]:
    """Arguments of Popen: own session, nothing inherited that could steer the server."""
    switch = {"user": account.uid, "group": account.gid, "extra_groups": []} if account else {}
    return {
        **switch,
        "cwd": "/",
        "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
        "start_new_session": True,
    }


def data_version(data: Path) -> int | None:
    """Major version of the server that made `data`; None when it is still to be made."""
    version = data / "PG_VERSION"
    if version.is_file():
        return int(version.read_text())
    if data.is_dir() and any(data.iterdir()):
        raise PostgresPathUnusable(
            f"{data} holds something that is not a PostgreSQL database; choose another directory"
        )
    return None


def private_directory(path: Path, account: Account | None) -> None:
    """`path` for the server's user alone."""
    path.mkdir(parents=True, exist_ok=True)
    if account is not None:
        os.chown(path, account.uid, account.gid)
    path.chmod(0o700)
    if not reaches(account, path):
        raise PostgresPathUnusable(
            f"{account.name if account else 'the server'} cannot reach {path}: a directory above it is closed to others"
        )


async def initialise(programs: Programs, data: Path, account: Account | None, *, durable: bool) -> None:
    """Make the cluster with one superuser and one database. Made aside and renamed: it is whole or absent."""
    fresh = data.parent / f".{data.name}.new"
    await trio.to_thread.run_sync(_empty, fresh, account)
    command = [programs.directory / "initdb", "-D", fresh, "-A", "trust", "-E", "UTF8", "--locale=C", "-U", USER]
    await _run([*command, *([] if durable else ["--no-sync"])], account)
    single = [programs.directory / "postgres", "--single", "-D", fresh, "-F", "postgres"]
    await _run(single, account, stdin=f"create database {DATABASE};\n".encode())
    if durable:
        await _run([programs.directory / "initdb", "-D", fresh, "--sync-only"], account)
    await trio.to_thread.run_sync(_put_in_place, fresh, data)
    log.info("postgres_initialised", data=str(data), version=programs.version[0])


def _empty(path: Path, account: Account | None) -> None:
    shutil.rmtree(path, ignore_errors=True)
    private_directory(path, account)


def _put_in_place(fresh: Path, data: Path) -> None:
    fresh.rename(data)  # over an empty directory too
    parent = os.open(data.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


async def _run(command: list[Any], account: Account | None, *, stdin: bytes = b"") -> None:
    with trio.move_on_after(INIT_TIMEOUT) as scope:
        done = await trio.run_process(
            command,
            stdin=stdin,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            **as_account(account),
        )
    if scope.cancelled_caught:
        raise PostgresFailed(f"{command[0]} took longer than {INIT_TIMEOUT:g} s")
    if done.returncode != 0:
        raise PostgresFailed(f"{command[0]} failed: {done.stdout.decode(errors='replace')[-1000:].strip()}")


async def end_leftovers(data: Path) -> None:
    """End what a crash left running on `data`, so that a new server can start. The caller holds the lock.

    Raises PostgresInUse when it does not end. Afterwards the pid file is gone: the server's own check would take any
    process that has got the old number for a running server.
    """
    for number, patience in LEFTOVER_PATIENCE:
        left = await trio.to_thread.run_sync(_processes_on, data)
        if not left:
            break
        server = _recorded_server(data)
        with trio.move_on_after(patience):
            async with trio.open_nursery() as nursery:
                for pid in left:
                    told = number if pid == server or number != signal.SIGINT else None
                    nursery.start_soon(_end, pid, data, told)
    if left := await trio.to_thread.run_sync(_processes_on, data):
        raise PostgresInUse(f"processes {left} still use {data} and do not end")
    (data / "postmaster.pid").unlink(missing_ok=True)


async def _end(pid: int, data: Path, number: int | None) -> None:
    """Send `number` if given, and wait until the process has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not _works_on(pid, data):  # ended since it was listed; the handle may be of another
            return
        if number is not None:
            log.warning("postgres_leftover_ended", pid=pid, signal=number)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
        await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)


def _processes_on(data: Path) -> list[int]:
    return [
        pid for entry in Path("/proc").iterdir() if entry.name.isdigit() and _works_on(pid := int(entry.name), data)
    ]


def _works_on(pid: int, data: Path) -> bool:
    """Whether it is a server process of this cluster: they all work in the data directory."""
    try:
        process = Path(f"/proc/{pid}")
        program = (process / "exe").readlink().name.removesuffix(" (deleted)")
        return program == "postgres" and (process / "cwd").readlink() == data.resolve()
    except OSError:  # it has ended, or is not ours to look at
        return False


def _recorded_server(data: Path) -> int | None:
    try:
        return int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None
