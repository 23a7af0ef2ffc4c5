"""A process of a sandbox in a pipeline: its input, output, signals and exit code are ours."""

from __future__ import annotations

import contextlib
import errno
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import trio

from capsule.cli import stdio
from capsule.cli.failures import Failure, say
from capsule.cli.output import chunk_line
from capsule.cli.patience import Patience, is_loss
from capsule.cli.processes import exit_line
from capsule.cli.signalling import heeded
from capsule.client import CapsuleError, ExitStatus, LiveProcess

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
INSISTENT = 3
"""So often SIGINT or SIGTERM must come until we leave a process that takes no notice; as docker does."""


@dataclass(slots=True)
class Pipe:
    """Connects a process with our standard streams. `stdin`: it gets ours; else its input ends at once, or stays open
    (`keep_open`: the process is detached, and others may send). `attach`: comes back after a lost connection, given the
    count of output bytes that were had; None when that cannot be.

    Owned by: its command. Dies when: the process ends, our output is no longer read, somebody insists.
    """

    stdin: bool
    as_json: bool = False
    keep_open: bool = False
    attach: Callable[[int], AbstractAsyncContextManager[LiveProcess]] | None = None
    patience: Patience = field(default_factory=Patience)
    _process: LiveProcess | None = None
    _sent: bool = False
    _shown: int = 0
    _interrupted: int | None = None
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def run(self, opening: AbstractAsyncContextManager[LiveProcess]) -> int:
        """The exit code. A signal before the process runs ends us."""
        status: ExitStatus | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_signals)
            with self._scope:
                async with opening as process:
                    self._shown = process.received
                    self._process = process
                    nursery.start_soon(self._feed)
                    status = await self._show_until_over(process)
            nursery.cancel_scope.cancel()
        if status is None:
            return 128 + (self._interrupted or signal.SIGKILL)
        if self.as_json:
            await stdio.write_all(stdio.STDOUT, exit_line(status))
        elif status.timed_out:
            say("the process was killed: it ran longer than --timeout")
        return status.exit_code

    async def _show_until_over(self, process: LiveProcess) -> ExitStatus:
        try:
            return await self._show(process)
        except CapsuleError as error:
            lost = error
        while self.attach is not None and is_loss(lost):
            self._process = None
            if self._sent:
                raise Failure(f"{lost}; what of the input has arrived is not known") from lost
            if not await self.patience.wait():
                break
            try:
                async with self.attach(self._shown) as again:
                    self._process = again
                    self.patience.restored()
                    if again.skipped:
                        say(f"{again.skipped} bytes of output were lost with the connection")
                    return await self._show(again)
            except CapsuleError as error:
                lost = error
        raise lost

    async def _show(self, process: LiveProcess) -> ExitStatus:
        self._shown = process.received
        async for chunk in process:
            data = chunk_line(chunk.stream, chunk.data) if self.as_json else chunk.data
            to_stderr = chunk.stream == "stderr" and not self.as_json
            await stdio.write_all(stdio.STDERR if to_stderr else stdio.STDOUT, data)
            self._shown += len(chunk.data)
        return await process.wait()

    async def _feed(self) -> None:
        """Our input, until it ends. Whoever reads the output hears of a lost connection."""
        process = self._process
        if process is None or self.keep_open:
            return
        with contextlib.suppress(CapsuleError, trio.ClosedResourceError):
            if self.stdin:
                try:
                    async for data in stdio.chunks(stdio.STDIN):
                        self._sent = True
                        await process.send(data)
                except OSError as error:
                    if error.errno not in (errno.EBADF, errno.EIO):  # closed; or a terminal that has gone
                        raise
            await process.end()

    async def _watch_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        counted: Counter[int] = Counter()
        with trio.open_signal_receiver(*heeded(*FORWARDED)) as received:
            task_status.started()
            async for number in received:
                counted[number] += 1
                insisted = counted[signal.SIGINT] + counted[signal.SIGTERM] >= INSISTENT
                if self._process is None or insisted:
                    self._interrupted = number
                    self._scope.cancel()
                    return
                with contextlib.suppress(CapsuleError, trio.ClosedResourceError):
                    await self._process.signal(signal.Signals(number).name)
