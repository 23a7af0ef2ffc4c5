"""`capsule ps`, `kill`, `logs`: what runs in a sandbox."""

from __future__ import annotations

import re
import shlex
import signal as signals

import click

from capsule.cli import stdio
from capsule.cli.failures import Failure, say
from capsule.cli.finding import SandboxId, find
from capsule.cli.output import ago, as_document, chunk_line, json_option, show, table, write
from capsule.cli.running import Command, run
from capsule.client import ExitStatus, LiveProcess, ProcessInfo, TrioClient

one_sandbox = click.argument("sandbox_id", metavar="SANDBOX", type=SandboxId())
one_process = click.argument("process", metavar="PROCESS")


@click.command(cls=Command)
@one_sandbox
@json_option
def ps(*, sandbox_id: str, as_json: bool) -> None:
    """List the processes of a sandbox that exec and terminals have started."""

    async def action(capsule: TrioClient) -> list[ProcessInfo]:
        return await (await find(capsule, sandbox_id)).processes.list()

    found = run(action)
    write(as_document(found) if as_json else table(("PID", "TAG", "USER", "AGE", "COMMAND"), map(_row, found)))


@click.command(cls=Command)
@one_sandbox
@one_process
@click.option("-s", "--signal", "name", default="TERM", show_default=True, help="By name or number.")
@json_option
def kill(*, sandbox_id: str, process: str, name: str, as_json: bool) -> None:
    """Send a signal to PROCESS (its pid or tag) and its whole process group."""
    name = signal_name(name)

    async def action(capsule: TrioClient) -> None:
        await (await find(capsule, sandbox_id)).processes.signal(process, name)

    run(action)
    if as_json:
        show({"process": process, "signal": name}, as_json=True, text="")


@click.command(cls=Command)
@one_sandbox
@one_process
@click.option("-f", "--follow", is_flag=True, help="Go on until the process ends.")
@json_option
def logs(*, sandbox_id: str, process: str, follow: bool, as_json: bool) -> None:
    """Print the last 64 KiB that PROCESS (its pid or tag) has written; for those that `exec -d` and `exec -t` started.

    Whoever is attached to it stays so."""

    async def action(capsule: TrioClient) -> None:
        sandbox = await find(capsule, sandbox_id)
        async with sandbox.attach(named(process), observe=True) as watched:
            status = await _print(watched, follow=follow, as_json=as_json)
        if as_json and status is not None:
            await stdio.write_all(stdio.STDOUT, exit_line(status))

    run(action)


def exit_line(status: ExitStatus) -> bytes:
    """The last line of a stream as JSON."""
    return f"{as_document({'type': 'exit', **_present(status)})}\n".encode()


def named(process: str) -> int | str:
    """A pid or a tag."""
    return int(process) if process.isascii() and process.isdigit() else process


def signal_name(text: str) -> str:
    """`TERM`, `sigterm` or `15` as the API has it."""
    name = text.upper()
    if re.fullmatch("[0-9]{1,2}", name):
        return name
    name = name if name.startswith("SIG") else f"SIG{name}"
    if name not in signals.Signals.__members__:
        raise Failure(f"{text!r} is not a signal; `kill -l` lists them")
    return name


async def _print(process: LiveProcess, *, follow: bool, as_json: bool) -> ExitStatus | None:
    """What it has written, and what it writes; how it ended, if it has. Without `follow` the replay alone."""
    end, skipped = process.received + process.replay, process.skipped
    while follow or process.ended or process.received < end:
        chunk = await anext(process, None)
        if chunk is None:
            break
        target = stdio.STDERR if chunk.stream == "stderr" and not as_json else stdio.STDOUT
        await stdio.write_all(target, chunk_line(chunk.stream, chunk.data) if as_json else chunk.data)
        if process.skipped > skipped:
            say(f"{process.skipped - skipped} bytes were left out: they came faster than they were taken")
            skipped = process.skipped
    return process.exit


def _present(status: ExitStatus) -> dict[str, object]:
    found = {name: getattr(status, name) for name in status.__struct_fields__}
    return {name: value for name, value in found.items() if value is not None}


def _row(one: ProcessInfo) -> tuple[str, ...]:
    command = one.cmd if one.args is None else shlex.join([one.cmd, *one.args])
    return str(one.pid), one.tag or "-", one.user, ago(one.started_at), command
