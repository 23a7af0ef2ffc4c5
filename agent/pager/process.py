"""Processes by identity: a pid alone would name a stranger once it has been used again."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import trio


class ProcessIdentity(NamedTuple):
    """`start_time`: clock ticks since the machine's boot (field 22 of /proc/PID/stat)."""

    pid: int
    start_time: int


def start_time_of(pid: int) -> int | None:
    """When a process was started; None if there is none with this pid."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, and may itself hold spaces and parentheses.
    return int(text.rpartition(")")[2].split()[19])


def open_process(identity: ProcessIdentity) -> int | None:
    """A pidfd of a process that runs; None if it has gone. The caller closes it."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return None
    # The pidfd is open first: if the start time still fits, it can only be this process.
    if start_time_of(identity.pid) != identity.start_time or has_ended(pidfd):
        os.close(pidfd)
        return None
    return pidfd


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended, reaped or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def kill(pidfd: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; harmless if the process has gone."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


async def wait_ended(pidfd: int) -> None:
    """Wait until the process has ended. One task at a time for one descriptor."""
    await trio.lowlevel.wait_readable(pidfd)
