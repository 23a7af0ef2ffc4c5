"""The data directory of `capsule dev`.

<data>/dev.lock          held while a `capsule dev` runs here
<data>/secrets.env       CAPSULE_SECRET_KEY and CAPSULE_API_KEY, mode 0600
<data>/programs.json     pids and start times of our programs, to be ended after a kill -9 of us
<data>/postgres, agent, images, cache
"""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
from dotenv import dotenv_values

SECRETS = "secrets.env"
LOCK = "dev.lock"
END_PATIENCE = 10.0


class DataDirectoryInUse(Exception):  # noqa: N818 - reads as what happened
    """Another `capsule dev` runs on this directory."""


class ProgramRecord(msgspec.Struct, frozen=True):
    """A process of ours: pid, and start time in clock ticks since boot."""

    pid: int
    start_time: int


def lock(data: Path) -> int:
    """Be the only one here; held until the process ends."""
    data.mkdir(parents=True, exist_ok=True)
    fd = os.open(data / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(fd)
        raise DataDirectoryInUse(f"another `capsule dev` runs on {data}") from err
    return fd


def is_locked(data: Path) -> bool:
    """Whether somebody is here."""
    try:
        fd = os.open(data / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def read_secrets(data: Path) -> dict[str, str]:
    """The secrets of this installation; the secret key is made on first use."""
    known = {k: v for k, v in dotenv_values(data / SECRETS).items() if v}
    if "CAPSULE_SECRET_KEY" not in known:
        known["CAPSULE_SECRET_KEY"] = secrets.token_hex(32)
        write_secrets(data, known)
    return known


def write_secrets(data: Path, values: dict[str, str]) -> None:
    """Keep the secrets, durably, for root's eyes."""
    replace(data / SECRETS, "".join(f"{key}={value}\n" for key, value in sorted(values.items())).encode())


def replace(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file so that it is there whole or not at all, also after a loss of power."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)  # one that a crash left may have another owner or mode
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remember_programs(data: Path, pids: list[int]) -> None:
    """Note our running programs."""
    records = [ProgramRecord(pid, start) for pid in pids if (start := start_time(pid)) is not None]
    replace(data / "programs.json", msgspec.json.encode(records))


def end_remembered_programs(data: Path) -> int:
    """End what an earlier `capsule dev`, killed itself, left running; returns how many there were. Blocks."""
    try:
        records = msgspec.json.decode((data / "programs.json").read_bytes(), type=list[ProgramRecord])
    except (FileNotFoundError, msgspec.MsgspecError):
        return 0
    with ExitStack() as stack:
        alive = [fd for record in records if (fd := _open(record)) is not None]
        for fd in alive:
            stack.callback(os.close, fd)
        left = alive
        for number in (signal.SIGTERM, signal.SIGKILL):
            for fd in left:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, number)
            left = _wait_gone(left)
    return len(alive)


def _open(record: ProgramRecord) -> int | None:
    """A descriptor of the process, which no other process can become; None when it is gone."""
    try:
        fd = os.pidfd_open(record.pid)
    except (OSError, OverflowError):
        return None
    if start_time(record.pid) == record.start_time:
        return fd
    os.close(fd)
    return None


def _wait_gone(pidfds: list[int]) -> list[int]:
    """Wait until the processes have ended, END_PATIENCE at most; those that have not."""
    left = set(pidfds)
    deadline = time.monotonic() + END_PATIENCE
    while left and (seconds := deadline - time.monotonic()) > 0:
        ended, _, _ = select.select(left, [], [], seconds)  # readable: it has ended
        left -= set(ended)
    return [fd for fd in pidfds if fd in left]


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, in clock ticks since boot; None when there is no such process (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
