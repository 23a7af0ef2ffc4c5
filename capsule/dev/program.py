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
        self._stopping = False

    async def run(self) -> None:
        """Keep it running until `stop`, or until cancelled (then it is killed)."""
        failures = 0
        while not self._stopping:
            began = trio.current_time()
            await self._run_once()
            if self._stopping:
                return
            failures = 1 if trio.current_time() - began > STEADY else failures + 1
            delay = RESTART.delay(failures)
            log.warning("program_died", program=self.name, restart_in=delay, failures=failures)
            await trio.sleep(delay)

    async def _run_once(self) -> None:
        environment = await self._environment()
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
                with trio.CancelScope(shield=True), trio.move_on_after(5):
                    await process.wait()
            self._process = self.pid = None
        log.info("program_ended", program=self.name, code=process.returncode)

    async def stop(self, patience: float) -> None:
        """SIGTERM, wait up to `patience` seconds, SIGKILL."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        with trio.move_on_after(patience):
            await process.wait()
            return
        log.warning("program_killed", program=self.name, after_seconds=patience)
        process.kill()
        await process.wait()
