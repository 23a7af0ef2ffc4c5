"""Processes that somebody is attached to: consoles, terminals, what was detached and is attached to again.

Output and input go through one stream to the guest, whose credit is the only buffer. Signals and sizes go as calls of
their own, so that they never queue behind input that the process does not read.
"""

from __future__ import annotations

import math
import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
import trio

from agent.actor.supervise import RestartPolicy
from agent.wire.calls import NOTICE_CHANNEL, STDERR_CHANNEL, STDIN_CHANNEL, STDOUT_CHANNEL
from agent.wire.faults import Fault, FaultCode
from capsule import errors
from capsule.model import ProcessExit
from capsule.sandboxes import guest
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.flow import with_more

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agent.actor.peer import OpenedStream
    from capsule.hosts.links import HostLinks
    from capsule.model import StreamCall, TerminalSize
    from capsule.sandboxes.rows import Placed

log = structlog.get_logger()

START_SECONDS = 60.0
"""From the question to the guest's first word. As long as a guest may stand still for a snapshot, and what a busy one
adds to that."""
CONTROL_SECONDS = 10.0
"""A signal or a size; neither waits for anything but the guest daemon."""
RESIZE_RETRY = RestartPolicy(first_delay=0.2, max_delay=5)
OUTPUT_CHANNELS = frozenset({STDOUT_CHANNEL, STDERR_CHANNEL})


class LiveProcess:
    """See `capsule.http.stream_ports.ProcessStream`. Made by LiveProcesses, which also runs `keep_size`.

    `skipped` grows while an observer is too slow.
    """

    def __init__(
        self, links: HostLinks, placed: Placed, stream: OpenedStream, attached: guest.Attached, *, observe: bool
    ) -> None:
        self.pid = attached.pid
        self.tag = attached.tag
        self.terminal = attached.pty
        self.offset = attached.offset
        self.skipped = attached.skipped
        self.replay = attached.replay
        self.ended = attached.ended
        self._links = links
        self._placed = placed
        self._stream = stream
        self._observe = observe
        self._ended = False
        self._size: TerminalSize | None = None
        self._resized = trio.Event()

    async def send(self, data: bytes) -> None:
        """Bytes for its input; waits as long as it does not read. InvalidRequest from an observer, or after `end`."""
        self._refuse_observer()
        if self._ended:
            raise errors.InvalidRequest("the process's input was closed before")
        try:
            await self._stream.send(data, STDIN_CHANNEL)
        except Fault as fault:
            raise _as_error(fault) from fault

    async def end(self) -> None:
        """Its input ends here; nothing to a terminal, nothing the second time, nothing from an observer."""
        if not (self.terminal or self._ended or self._observe):
            self._ended = True
            await self._stream.end()
        else:
            await trio.lowlevel.checkpoint()

    def __aiter__(self) -> AsyncIterator[tuple[int, bytes]]:
        return self

    async def __anext__(self) -> tuple[int, bytes]:
        """Output as (1 or 2, bytes). When there is no more: raises why it broke off, ends if the process did."""
        async for channel, data in self._stream:
            if channel in OUTPUT_CHANNELS and not (self.terminal and channel == STDERR_CHANNEL):
                return channel, with_more(self._stream, channel, data)
            if channel != NOTICE_CHANNEL:
                raise guest.nonsense()
            self.skipped += guest.notice(guest.Skipped, data).skipped
        await self.exit()
        raise StopAsyncIteration

    async def exit(self) -> ProcessExit:
        """How it ended; waits for that, which takes somebody who reads the output."""
        try:
            reply = await self._stream.reply()
        except Fault as fault:
            raise _as_error(fault) from fault
        ended = guest.answer(guest.Ended, reply)
        return ProcessExit(
            exit_code=ended.exit_code, signal=ended.signal, duration_ms=ended.duration_ms, timed_out=ended.timed_out
        )

    async def signal(self, number: int) -> None:
        """To its process group. Nothing for one that has ended. InvalidRequest from an observer."""
        self._refuse_observer()
        try:
            await self._call("processes.signal", {"process": self.pid, "signal": number})
        except Fault as fault:
            if not _process_is_gone(fault):
                raise _as_error(fault) from fault

    async def resize(self, size: TerminalSize) -> None:
        """Of its terminal; returns at once. InvalidRequest when it has none, or from an observer."""
        self._refuse_observer()
        if not self.terminal:
            raise errors.InvalidRequest("the process has no terminal")
        self._size = size
        self._resized.set()
        await trio.lowlevel.checkpoint()

    async def keep_size(self) -> None:
        """Tell the guest the last size that was asked for; one call under way at most."""
        failures = 0
        while True:
            await self._resized.wait()
            self._resized = trio.Event()
            size = self._size
            assert size is not None  # noqa: S101 - set before the event
            try:
                await self._call("processes.resize", {"process": self.pid, "cols": size.cols, "rows": size.rows})
                failures = 0
            except Fault as fault:
                if not fault.retryable:
                    log.info("terminal_not_resized", sandbox_id=str(self._placed.id), code=fault.code)
                    continue
                failures += 1
                with trio.move_on_after(RESIZE_RETRY.delay(failures)):
                    await self._resized.wait()
                self._resized.set()

    def _refuse_observer(self) -> None:
        if self._observe:
            raise errors.InvalidRequest("who observes a process only looks on; attach without observe")

    async def _call(self, method: str, body: dict[str, Any]) -> None:
        await self._links.call(
            self._placed.host, method, {"sandbox_id": str(self._placed.id), **body}, timeout=CONTROL_SECONDS
        )


@dataclass(frozen=True, kw_only=True)
class LiveProcesses:
    """Starts them and attaches to them."""

    links: HostLinks

    @asynccontextmanager
    async def start(self, placed: Placed, call: StreamCall) -> AsyncIterator[LiveProcess]:
        """Start one; leaving kills it, unless it is detached or has a terminal."""
        body = _question(placed, call)
        tag = str(body.get("tag", ""))

        def believe(said: guest.Attached) -> guest.Attached:
            """A process that has just begun: all but its pid we know ourselves."""
            return guest.Attached(pid=said.pid, tag=tag, pty=call.terminal is not None)

        async with self._open(placed, "exec", body, believe, not_found=errors.InvalidRequest) as process:
            yield process

    @asynccontextmanager
    async def attach(
        self, placed: Placed, process: int | str, *, offset: int | None, observe: bool
    ) -> AsyncIterator[LiveProcess]:
        """Attach to a detached one; leaving detaches."""
        body: dict[str, Any] = {"sandbox_id": str(placed.id), "process": process}
        if offset is not None:
            body["offset"] = offset
        if observe:
            body["observe"] = True
        async with self._open(placed, "processes.attach", body, lambda said: said, observe=observe) as attached:
            yield attached

    @asynccontextmanager
    async def _open(
        self,
        placed: Placed,
        method: str,
        body: dict[str, Any],
        believe: Callable[[guest.Attached], guest.Attached],
        *,
        observe: bool = False,
        not_found: Callable[[str], errors.CapsuleError] = errors.NotFound,
    ) -> AsyncIterator[LiveProcess]:
        failure: Exception | None = None
        with trio.CancelScope(deadline=trio.current_time() + START_SECONDS) as starting:
            try:
                async with self.links.open_stream(placed.host, method, body, timeout=math.inf) as stream:
                    attached = believe(await _first_notice(stream))
                    starting.deadline = math.inf
                    process = LiveProcess(self.links, placed, stream, attached, observe=observe)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(process.keep_size)
                        try:
                            yield process
                        except Exception as err:  # noqa: BLE001 - raised below, not in the nursery's group
                            failure = err
                        nursery.cancel_scope.cancel()
            except Fault as fault:
                raise _as_error(fault, not_found=not_found) from fault
        if failure is not None:
            raise failure
        if starting.cancelled_caught:
            raise errors.HostUnavailable(f"the sandbox did not answer in {START_SECONDS:g} s", retry_after=2)


async def _first_notice(stream: OpenedStream) -> guest.Attached:
    """What the guest says first. Raises its Fault, or HostUnavailable when it makes no sense."""
    async for channel, data in stream:
        if channel != NOTICE_CHANNEL:
            break
        return guest.notice(guest.Attached, data)
    else:
        await stream.reply()
    raise guest.nonsense()


def _question(placed: Placed, call: StreamCall) -> dict[str, Any]:
    body: dict[str, Any] = {"sandbox_id": str(placed.id), "live": True, "envs": dict(call.envs)}
    tag = call.tag
    if call.terminal is not None:
        body["pty"] = {"cols": call.terminal.cols, "rows": call.terminal.rows}
        tag = tag or f"pty-{secrets.token_hex(4)}"
    else:
        body["stdin"] = True
        if call.detach:
            body["detach"] = True
            tag = tag or f"exec-{secrets.token_hex(4)}"
    if call.args is not None:
        body["args"] = list(call.args)
    if call.timeout_sec is not None:
        body["timeout_ms"] = call.timeout_sec * 1000
    optional = {"cmd": call.cmd, "cwd": call.cwd, "user": call.user, "tag": tag}
    return body | {name: value for name, value in optional.items() if value is not None}


def _process_is_gone(fault: Fault) -> bool:
    return fault.code == FaultCode.NOT_FOUND and "object" not in fault.details


def _as_error(
    fault: Fault, *, not_found: Callable[[str], errors.CapsuleError] = errors.NotFound
) -> errors.CapsuleError:
    if fault.code == FaultCode.CONFLICT and fault.details.get("taken_over") is True:
        message = "somebody else has attached to the process; attach again to take over, or observe it"
        return errors.Conflict(message, taken_over=True)
    return as_error(fault, not_found=not_found)
