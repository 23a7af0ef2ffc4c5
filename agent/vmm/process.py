"""A VMM process: started to outlive us, watched through a pidfd, recognised again after our own restart."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from agent.vmm.driver import VmProcess, VmStatistics
from agent.vmm.namespace import start_inside

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
"""All a VMM gets: ours may hold secrets."""

PRLIMIT = "prlimit"
"""Of util-linux, so always there. It forbids a core dump, which would hold the guest's memory: secrets, and gigabytes.
Python could only do that by running code of ours between fork and exec, which is not safe in a program with threads."""

TRACED_RETRY = 0.05
"""Seconds between looks at a process that has died but still belongs to a debugger."""


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a process ended. `status` is an exit status, `signal` a signal's number; both None: it was not our child."""

    status: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"was killed by {signal.Signals(self.signal).name}"
        if self.status is not None:
            return f"exited with status {self.status}"
        return "is gone"


class WatchedProcess:
    """A process held by a pidfd: waiting and killing can never hit another process that got its pid.

    Works for our children, which it reaps, and for processes of an earlier agent. Dropping it ends nothing.
    """

    def __init__(self, identity: VmProcess, pidfd: int) -> None:
        self.identity = identity
        self._pidfd = pidfd
        self._exit: ProcessExit | None = None
        weakref.finalize(self, os.close, pidfd)

    @classmethod
    def open(cls, identity: VmProcess) -> WatchedProcess | None:
        """Take hold of a process; None if it has gone."""
        try:
            pidfd = os.pidfd_open(identity.pid)
        except ProcessLookupError:
            return None
        watched = cls(identity, pidfd)
        # The pidfd is open first: if the start time still fits, it can only be this process.
        if read_identity(identity.pid) != identity:
            return None
        if watched.has_exited():
            watched._exit = watched._reap()
            return None
        return watched

    def has_exited(self) -> bool:
        """Whether the process has ended (reaped or not)."""
        if self._exit is not None:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def kill(self) -> None:
        """Send SIGKILL; harmless if the process has gone."""
        if self._exit is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> ProcessExit:
        """Wait until the process has ended, and reap it if it is ours. Any number of tasks may wait."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._exit is None:
            descriptor = os.dup(self._pidfd)  # a descriptor can have one waiting task
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)
            if self._exit is None:
                self._exit = self._reap()
            if self._exit is None:
                await trio.sleep(TRACED_RETRY)
        return self._exit

    def statistics(self) -> VmStatistics | None:
        """Resident memory and CPU time, None once the process has gone."""
        fields = read_stat(self.identity.pid)
        if fields is None or fields.start_time != self.identity.start_time or fields.state in "ZX":
            return None
        return VmStatistics(resident_bytes=fields.resident_bytes, cpu_seconds=fields.cpu_seconds)

    def _reap(self) -> ProcessExit | None:
        try:
            info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return ProcessExit()
        if info is None:
            return None
        if info.si_code == os.CLD_EXITED:
            return ProcessExit(status=info.si_status)
        return ProcessExit(signal=info.si_status)


def spawn(
    command: Sequence[str],
    *,
    directory: Path,
    uid: int,
    gid: int,
    groups: Iterable[int],
    output: int,
    descriptors: Iterable[int],
    network_namespace: Path | None = None,
) -> WatchedProcess:
    """Start a process that outlives us, in its own session; it may still die of a bad command line. Blocks.

    `output` is a descriptor for its standard output and error; `descriptors` stay open in it under their numbers.
    Raises OSError.
    """
    start = partial(
        subprocess.Popen,
        [PRLIMIT, "--core=0", "--nofile=1024", *command],
        cwd=directory,
        user=uid,
        group=gid,
        extra_groups=list(groups),
        umask=0o077,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=tuple(descriptors),
        start_new_session=True,
    )
    child = start() if network_namespace is None else start_inside(network_namespace, start)
    try:
        watched = WatchedProcess(_identity_of_child(child.pid), os.pidfd_open(child.pid))
    except BaseException:
        child.kill()
        child.wait()
        raise
    # We reap through the pidfd. Left alone, Popen would reap behind our back, at its next use after being dropped.
    child.returncode = 0
    return watched


def _identity_of_child(pid: int) -> VmProcess:
    identity = read_identity(pid)
    if identity is None:  # not before it is reaped, and only we do that
        raise ProcessLookupError(f"process {pid} has no entry in {PROC}")
    return identity


@dataclass(frozen=True, slots=True)
class Stat:
    """The part of /proc/PID/stat that we use."""

    state: str
    start_time: int
    cpu_seconds: float
    resident_bytes: int


def read_stat(pid: int) -> Stat | None:
    """Read a process' entry; None if there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, and may itself hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return Stat(
        state=fields[0],
        start_time=int(fields[19]),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / TICKS,
        resident_bytes=int(fields[21]) * PAGE_BYTES,
    )


def read_identity(pid: int) -> VmProcess | None:
    """Return the identity of the process that has this pid now."""
    stat = read_stat(pid)
    return None if stat is None else VmProcess(pid, stat.start_time)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running process as the process table shows it."""

    identity: VmProcess
    program: str
    directory: Path
    arguments: tuple[str, ...]


def inspect(pid: int) -> Candidate | None:
    """Describe a running process; None if it has gone or is none of our business (not ours to look at)."""
    entry = PROC / str(pid)
    try:
        stat = read_stat(pid)
        if stat is None or stat.state in "ZX":
            return None
        program = _link(entry / "exe").name
        directory = _link(entry / "cwd")
        arguments = tuple((entry / "cmdline").read_bytes().decode(errors="replace").split("\0"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return Candidate(VmProcess(pid, stat.start_time), program, directory, arguments)


def processes() -> Iterator[Candidate]:
    """Describe every process of the machine that we may look at."""
    for entry in PROC.iterdir():
        if entry.name.isdecimal() and (candidate := inspect(int(entry.name))) is not None:
            yield candidate


def users_of(pid: int) -> frozenset[int]:
    """Return the users a process runs as: real, effective, saved, and for files. Empty if it has gone.

    Unlike its directory and its arguments they cannot be changed by the process, unless it has privileges.
    """
    try:
        lines = (PROC / str(pid) / "status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return frozenset()
    return frozenset(int(user) for line in lines if line.startswith("Uid:") for user in line.split()[1:])


def processes_of(users: Container[int]) -> Iterator[tuple[int, VmProcess]]:
    """Return every process that runs as one of these users, with that user. Those that have ended do not count.

    What /proc says of a process' state is not asked: one whose first thread has ended looks like a zombie.
    """
    for entry in PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        pid = int(entry.name)
        if not any(user in users for user in users_of(pid)):
            continue
        identity = read_identity(pid)
        if identity is not None and WatchedProcess.open(identity) is not None:
            yield from ((user, identity) for user in users_of(pid) if user in users)


def _link(path: Path) -> Path:
    # The kernel marks a file that has been removed since, or replaced by an upgrade. The process is still there.
    return Path(str(path.readlink()).removesuffix(" (deleted)"))
