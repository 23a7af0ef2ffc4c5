"""Running commands in a sandbox: POST …/exec, …/processes."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from agent.wire.calls import NOTICE_CHANNEL, STDERR_CHANNEL, STDIN_CHANNEL, STDOUT_CHANNEL
from agent.wire.faults import Fault, FaultCode
from capsule import errors
from capsule.model import ExecResult, ExecStarted, ProcessView
from capsule.sandboxes import guest
from capsule.sandboxes.failures import as_error

if TYPE_CHECKING:
    from agent.actor.peer import OpenedStream
    from capsule.hosts.links import HostLinks
    from capsule.model import ExecCall
    from capsule.sandboxes.rows import Placed

MAX_OUTPUT_BYTES = 10 * 1024 * 1024
"""Of stdout and stderr together that one exec may collect; more belongs into a file or a stream."""
SHOWN_OUTPUT_BYTES = 64 * 1024
"""Of each that the error for too much output shows."""
MAX_COLLECTED_BYTES = 256 * 1024 * 1024
"""Of all execs of this process together: what keeps a thousand floods from filling its memory."""
QUEUE_SECONDS = 60.0
"""How long an exec may wait for its turn in the sandbox, on top of its own time-out."""
CALL_SECONDS = 30.0


class OutputBudget:
    """Bytes of output that all execs of this process hold now."""

    def __init__(self, limit: int = MAX_COLLECTED_BYTES) -> None:
        self._limit = limit
        self.held = 0

    def take(self, amount: int) -> None:
        """Hold `amount` more. Busy when everything is taken."""
        if self.held + amount > self._limit:
            raise errors.Busy("too much command output is being collected at once; try again", retry_after=2)
        self.held += amount

    def give_back(self, amount: int) -> None:
        """Let go."""
        self.held -= amount


@dataclass
class Output:
    """What one exec printed so far, within its own limit and the budget of all."""

    budget: OutputBudget
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    began_at: float = field(default_factory=trio.current_time)
    process_runs: bool = False

    def duration_ms(self) -> int:
        """Since the request, as seen from here."""
        return round((trio.current_time() - self.began_at) * 1000)

    def size(self) -> int:
        """Bytes held."""
        return len(self.stdout) + len(self.stderr)

    def add(self, channel: int, data: bytes) -> None:
        """Collect a chunk. OutputTooLarge with the beginning, Busy."""
        self.process_runs = self.process_runs or channel == NOTICE_CHANNEL
        into = {STDOUT_CHANNEL: self.stdout, STDERR_CHANNEL: self.stderr}.get(channel)
        if into is None:
            return
        if self.size() + len(data) > MAX_OUTPUT_BYTES:
            raise errors.OutputTooLarge(
                f"the command printed more than {MAX_OUTPUT_BYTES} bytes and was killed; write to a file instead",
                stdout=bytes(self.stdout[:SHOWN_OUTPUT_BYTES]),
                stderr=bytes(self.stderr[:SHOWN_OUTPUT_BYTES]),
                duration_ms=self.duration_ms(),
            )
        self.budget.take(len(data))
        into += data


@dataclass(frozen=True, kw_only=True)
class Execs:
    """Runs and looks after processes in sandboxes."""

    links: HostLinks
    budget: OutputBudget = field(default_factory=OutputBudget)

    async def exec(self, placed: Placed, call: ExecCall) -> ExecResult | ExecStarted:
        """Run a command. A caller that goes away takes the process with it, unless it runs in the background."""
        body = _question(placed, call)
        timeout = (call.timeout_sec or 0) + QUEUE_SECONDS
        output = Output(self.budget)
        try:
            async with self.links.open_stream(placed.host, "exec", body, timeout=timeout) as stream:
                if call.background:
                    await stream.end()
                    started = guest.answer(guest.Started, await stream.reply())
                    return ExecStarted(pid=started.pid, tag=started.tag)
                await _converse(stream, call.stdin, output)
                reply = await stream.reply()
        except Fault as fault:
            if fault.code == FaultCode.DEADLINE_EXCEEDED and output.process_runs:
                raise _timed_out(call, output, output.duration_ms()) from fault
            raise as_error(fault, not_found=errors.InvalidRequest) from fault
        finally:
            self.budget.give_back(output.size())
        return _result(call, output, guest.answer(guest.Ended, reply))

    async def processes(self, placed: Placed) -> list[ProcessView]:
        """Everything started by exec that still runs."""
        reply = guest.answer(guest.Processes, await self._call(placed, "processes.list", {}))
        return [process.view() for process in reply.processes]

    async def signal(self, placed: Placed, process: int | str, signal: int) -> None:
        """Signal a process group by pid or tag."""
        await self._call(placed, "processes.signal", {"process": process, "signal": signal})

    async def ping(self, placed: Placed) -> None:
        """Reset the idle clock on the host."""
        await self._call(placed, "sandbox.ping", {})

    async def _call(self, placed: Placed, method: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return await self.links.call(
                placed.host, method, {"sandbox_id": str(placed.id), **body}, timeout=CALL_SECONDS
            )
        except Fault as fault:
            raise as_error(fault) from fault


async def _converse(stream: OpenedStream, stdin: bytes | None, output: Output) -> None:
    """Send stdin while collecting what comes back."""
    failure: errors.CapsuleError | None = None

    async def feed() -> None:
        try:
            if stdin:
                await stream.send(stdin, STDIN_CHANNEL)
            await stream.end()
        except Fault:
            return  # the last frame tells

    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed)
        try:
            async for channel, data in stream:
                output.add(channel, data)
        except errors.CapsuleError as err:
            failure = err
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _question(placed: Placed, call: ExecCall) -> dict[str, Any]:
    body: dict[str, Any] = {
        "sandbox_id": str(placed.id),
        "cmd": call.cmd,
        "envs": dict(call.envs),
        "stdin": call.stdin is not None,
        "background": call.background,
    }
    if call.args is not None:
        body["args"] = list(call.args)
    if call.timeout_sec is not None:
        body["timeout_ms"] = call.timeout_sec * 1000
    if call.background and call.tag is None:
        body["tag"] = f"exec-{secrets.token_hex(4)}"
    for name in ("cwd", "user", "tag"):
        if (value := getattr(call, name)) is not None:
            body[name] = value
    return body


def _result(call: ExecCall, output: Output, ended: guest.Ended) -> ExecResult:
    if ended.timed_out:
        raise _timed_out(call, output, ended.duration_ms)
    return ExecResult(
        stdout=bytes(output.stdout),
        stderr=bytes(output.stderr),
        exit_code=ended.exit_code,
        duration_ms=ended.duration_ms,
    )


def _timed_out(call: ExecCall, output: Output, duration_ms: int) -> errors.ExecTimeout:
    return errors.ExecTimeout(
        f"the command did not end in {call.timeout_sec} s and was killed; allow more with timeout_sec, or run it"
        " with background: true",
        stdout=bytes(output.stdout),
        stderr=bytes(output.stderr),
        duration_ms=duration_ms,
    )
