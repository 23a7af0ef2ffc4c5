"""Keeps a pager running: finds the one that runs, starts one where there is none, watches it.

Owns: nothing but the watch: the process has a session of its own and outlives the agent, as its VMs do. Owned by: the
agent's daemon, which runs `run` in its nursery. Dies when: it is cancelled.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

import agent
from agent.actor.peer import OpenerPeer
from agent.actor.supervise import RestartPolicy, supervise
from agent.pager.control import SOCKET
from agent.pager.process import has_ended, kill, open_process, wait_ended
from agent.pager.process_file import program_version, read_process_file
from agent.pager.sockets import connect_unix, remove_socket
from agent.wire.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Sequence

log = structlog.get_logger()

POLICY = RestartPolicy(first_delay=0.05, max_delay=5.0)
"""Guests stand still while there is no pager, so the first restart comes at once."""
START_TIMEOUT = 20.0
CHECK_INTERVAL = 10.0
CHECK_TIMEOUT = 20.0
"""Seconds a pager may take to answer before it counts as hanging: it is killed then, its successor adopts its VMs."""
STOP_TIMEOUT = 5.0
LOG_FILE = "pager.log"
MAX_LOG_BYTES = 8 << 20


class PagerDied(Exception):  # noqa: N818 - says what happened
    """The process has ended, was hanging, or did not start."""


class PagerSupervisor:
    """Keeps a pager serving from `directory`."""

    def __init__(self, directory: Path, *, arguments: Sequence[str] = ()) -> None:
        """`arguments`: more of them for the process, see `__main__`."""
        self._directory = directory
        self._arguments = arguments
        self._known_version = program_version()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep one running until cancelled; `started()` when one answers."""
        waiting: list[trio.TaskStatus[None]] = [task_status]
        await supervise("pager", partial(self._keep, waiting), POLICY)

    async def _keep(self, waiting: list[trio.TaskStatus[None]]) -> None:
        pidfd = await self._find()
        if pidfd is None:
            pidfd = await self._start()
        try:
            if waiting:
                waiting.pop().started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._check, pidfd)
                await wait_ended(pidfd)
                nursery.cancel_scope.cancel()
        finally:
            _reap(pidfd)
            os.close(pidfd)
        raise PagerDied("the pager has ended")

    async def _find(self) -> int | None:
        """A pidfd of the pager that runs and answers; one that hangs, or of another version, is ended."""
        file = await trio.to_thread.run_sync(read_process_file, self._directory)
        pidfd = None if file is None else open_process(file.identity)
        if file is None or pidfd is None:
            return None
        if file.version == self._known_version and await answers(self._directory):
            log.info("pager_found", pid=file.pid)
            return pidfd
        log.warning("pager_replaced", pid=file.pid, version=file.version)
        await _end(pidfd)
        return None

    async def _start(self) -> int:
        """Start a process; its pidfd when it listens. Raises PagerDied, OSError."""
        ready, told = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                pidfd = await trio.to_thread.run_sync(self._spawn, told)
            finally:
                os.close(told)
            with trio.move_on_after(START_TIMEOUT):
                await trio.lowlevel.wait_readable(ready)
            os.set_blocking(ready, False)
            with suppress(BlockingIOError):
                if os.read(ready, 1):
                    return pidfd
        finally:
            os.close(ready)
        kill(pidfd)
        _reap(pidfd)
        os.close(pidfd)
        raise PagerDied(f"the pager did not start; see {self._directory / LOG_FILE}")

    def _spawn(self, told: int) -> int:
        """Blocks."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / LOG_FILE
        with suppress(FileNotFoundError):
            if path.stat().st_size > MAX_LOG_BYTES:
                path.replace(path.with_suffix(".log.1"))
        own = ["--directory", str(self._directory), "--ready-fd", str(told)]
        with path.open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "agent.pager", *own, *self._arguments],
                cwd="/",
                env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                    "LANG": "C.UTF-8",
                    "PYTHONPATH": str(Path(agent.__file__).parents[1]),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(told,),
                start_new_session=True,
            )
        pidfd = os.pidfd_open(child.pid)
        child.returncode = 0  # we reap through the pidfd; Popen would reap behind our back
        log.info("pager_started", pid=child.pid)
        return pidfd

    async def _check(self, pidfd: int) -> None:
        """Kill it when it hangs."""
        while True:
            await trio.sleep(CHECK_INTERVAL)
            if not await answers(self._directory) and not has_ended(pidfd):
                log.error("pager_hangs")
                kill(pidfd)


async def answers(directory: Path) -> bool:
    """Whether the pager of a directory answers a call."""
    with trio.move_on_after(CHECK_TIMEOUT):
        try:
            stream = await connect_unix(directory / SOCKET)
        except OSError:
            return False
        peer = OpenerPeer(stream)
        answered = False
        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(peer.run)
                await peer.call("statistics", {}, timeout=CHECK_TIMEOUT)
                answered = True
            except Fault as fault:
                log.warning("pager_does_not_answer", error=fault.message)
            nursery.cancel_scope.cancel()
        return answered
    return False


async def stop_pager(directory: Path) -> None:
    """End the pager of a directory, if one runs, and wait until it is gone; its VMs must be dead. For purges."""
    file = await trio.to_thread.run_sync(read_process_file, directory)
    pidfd = None if file is None else open_process(file.identity)
    if pidfd is not None:
        await _end(pidfd)
    remove_socket(directory / SOCKET)


async def _end(pidfd: int) -> None:
    """SIGTERM, SIGKILL, wait; closes the pidfd. Bounded."""
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            kill(pidfd, number)
            with trio.move_on_after(STOP_TIMEOUT):
                await wait_ended(pidfd)
                return
    finally:
        _reap(pidfd)
        os.close(pidfd)


def _reap(pidfd: int) -> None:
    """If it was our child."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
