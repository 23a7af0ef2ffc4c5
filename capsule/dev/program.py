"""One supervised program of `capsule dev`: started, started again when it dies, stopped in order.

Owns: the process. Owned by: the dev nursery. Takes: `stop`. Emits: `pid` (latest value), `changed` at each new one.
Dies when: stopped. Each program leads a session of its own, so that a Ctrl-C in the terminal reaches only us and the
order of stopping stays ours.
"""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import structlog
import trio

from agent.actor.supervise import RestartPolicy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

log = structlog.get_logger()

RESTART = RestartPolicy(first_delay=0.1, max_delay=5.0, within=30.0)
STEADY = 30.0
"""Seconds of life after which the next death counts as the first."""
KILL_PATIENCE = 5.0
"""Seconds that a killed process is waited for; one that hangs in the kernel is left behind."""


class Program:
    """See the module's docstring. `environment` is asked anew for each start."""

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Callable[[], Awaitable[Mapping[str, str]]],
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        self.pid: int | None = None
        self._command = command
        self._environment = environment
        self._changed = changed
        self._process: trio.Process | None = None
        self._between = trio.CancelScope()
        self._starting = trio.Lock()
        self._stopping = False

    async def run(self) -> None:
        """Keep it running until `stop`, or until cancelled (then it is killed)."""
        failures = 0
        while not self._stopping:
            environment: Mapping[str, str] | None = None
            with trio.CancelScope() as self._between:  # `stop` ends these waits
                if failures:
                    await trio.sleep(RESTART.delay(failures))
                environment = await self._environment()
            if environment is None:
                return
            began = trio.current_time()
            await self._run_once(environment)
            if not self._stopping:
                failures = 1 if trio.current_time() - began > STEADY else failures + 1
                log.warning("program_died", program=self.name, failures=failures, restart_in=RESTART.delay(failures))

    async def _run_once(self, environment: Mapping[str, str]) -> None:
        async with self._starting:  # `stop` sees the process, or its request is seen before there is one
            if self._stopping:
                return
            process = await trio.lowlevel.open_process(
                self._command, stdin=subprocess.DEVNULL, env=dict(environment), start_new_session=True
            )
            self._process, self.pid = process, process.pid
        self._changed()
        try:
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                with trio.move_on_after(KILL_PATIENCE, shield=True):
                    await process.wait()
            self._process = self.pid = None
        log.info("program_ended", program=self.name, code=process.returncode)

    async def stop(self, patience: float) -> None:
        """SIGTERM, wait up to `patience` seconds, SIGKILL. It is not started again."""
        self._stopping = True
        self._between.cancel()
        async with self._starting:
            process = self._process
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        with trio.move_on_after(patience):
            await process.wait()
            return
        log.warning("program_killed", program=self.name, after_seconds=patience)
        process.kill()
        with trio.move_on_after(KILL_PATIENCE):
            await process.wait()
