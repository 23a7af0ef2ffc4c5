"""`capsule exec` and `attach`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

import click

from capsule.cli import stdio
from capsule.cli.escapes import Escapes
from capsule.cli.failures import Failure, say
from capsule.cli.finding import SandboxId, find
from capsule.cli.output import json_option, printable, show
from capsule.cli.pairs import Pair, as_mapping
from capsule.cli.piping import Pipe
from capsule.cli.processes import named
from capsule.cli.running import Command, run
from capsule.cli.terminal import Session
from capsule.client import LiveProcess, Terminal, TrioClient, TrioSandbox

escape_option = click.option(
    "--escape",
    default="~",
    show_default=True,
    help="Begins keys for ourselves, as in ssh (`~?` lists them), or `none`.",
)
TERMINAL_NEEDED = "-t needs a terminal to show it in: our input is none"


@click.command("exec", cls=Command, context_settings={"allow_interspersed_args": False})
@click.argument("sandbox_id", metavar="SANDBOX", type=SandboxId())
@click.argument("command", metavar="[--] COMMAND [ARG]…", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "-t", "--tty", is_flag=True, help="In a terminal of its own, shown in ours. Without COMMAND a login shell."
)
@click.option("-i", "--interactive", is_flag=True, help="Send our input also when it is a terminal.")
@click.option("-n", "--no-stdin", is_flag=True, help="Never send our input, as ssh -n.")
@click.option("-d", "--detach", is_flag=True, help="Print the process's tag and leave it running; `attach`, `logs`.")
@click.option("--tag", help="Your own name for the process.")
@click.option(
    "-e", "--env", "envs", type=Pair(from_environment=True), multiple=True, help="NAME=VALUE, or NAME of ours."
)
@click.option("-w", "--workdir", "cwd", help="Where it starts.")
@click.option("-u", "--user", help="Who runs it.")
@click.option("--timeout", type=click.IntRange(min=1), help="Seconds after which it is killed. Without it: never.")
@escape_option
@json_option
def exec_(
    *,
    sandbox_id: str,
    command: Sequence[str],
    tty: bool,
    interactive: bool,
    no_stdin: bool,
    detach: bool,
    tag: str | None,
    envs: Sequence[tuple[str, str]],
    cwd: str | None,
    user: str | None,
    timeout: int | None,
    escape: str,
    as_json: bool,
) -> None:
    """Run a program in a sandbox. Its input, output and exit code are ours; options stand before SANDBOX.

    There is no shell in between: for pipes and variables of the sandbox say `capsule exec SANDBOX -- sh -c '…'`.
    Our input is sent unless it is a terminal. Ctrl-C and other signals go to the process; 125 is our own failure.
    """
    program = _program(command, tty=tty)
    _check(
        tty=tty, as_json=as_json, detach=detach, tag=tag, timeout=timeout, interactive=interactive, no_stdin=no_stdin
    )
    escapes = _escapes(escape)
    variables = as_mapping(envs) or {}

    async def action(capsule: TrioClient) -> int:
        sandbox = await find(capsule, sandbox_id)
        if tty:
            terminal = Session(sandbox, partial(_terminal_again, sandbox), owned=not detach, escapes=escapes)
            cols, rows = terminal.local.size()
            opening = sandbox.terminal(*program, cols=cols, rows=rows, envs=_with_term(variables), cwd=cwd, user=user)
            return await (_leave_terminal(opening, as_json=as_json) if detach else _show(terminal, opening))
        stream = sandbox.stream(
            *program, envs=variables, cwd=cwd, user=user, timeout_sec=timeout, detach=detach, tag=tag
        )
        if detach:
            return await _leave(stream, keep_open=interactive, as_json=as_json)
        return await Pipe(stdin=_sends_stdin(interactive=interactive, no_stdin=no_stdin), as_json=as_json).run(stream)

    raise click.exceptions.Exit(run(action))


@click.command(cls=Command)
@click.argument("sandbox_id", metavar="SANDBOX", type=SandboxId())
@click.argument("process", metavar="PROCESS")
@click.option("-n", "--no-stdin", is_flag=True, help="Do not send our input.")
@escape_option
@json_option
def attach(*, sandbox_id: str, process: str, no_stdin: bool, escape: str, as_json: bool) -> None:
    """Come back to PROCESS (its tag or pid), which `exec -d` or `exec -t` started.

    What it has written lately comes first. Whoever is attached to it is cut off. When we end it runs on."""
    escapes = _escapes(escape)

    async def action(capsule: TrioClient) -> int:
        sandbox = await find(capsule, sandbox_id)
        async with sandbox.attach(named(process), observe=True) as seen:
            tag, terminal = seen.tag or process, seen.terminal
        if terminal and not as_json and stdio.is_terminal(stdio.STDIN):
            session = Session(sandbox, partial(_terminal_again, sandbox), owned=False, escapes=escapes)
            cols, rows = session.local.size()
            return await _show(session, sandbox.terminal_attach(tag, cols=cols, rows=rows))

        def again(offset: int) -> AbstractAsyncContextManager[LiveProcess]:
            return sandbox.attach(tag, offset=offset)

        sends = not no_stdin and not stdio.is_terminal(stdio.STDIN)
        pipe = Pipe(stdin=sends, as_json=as_json, keep_open=not sends, attach=again)
        return await pipe.run(sandbox.attach(tag))

    raise click.exceptions.Exit(run(action))


async def _show(session: Session, opening: AbstractAsyncContextManager[Terminal]) -> int:
    end = await session.run(opening)
    if end.message:
        say(end.message)
    return end.code


async def _leave_terminal(opening: AbstractAsyncContextManager[Terminal], *, as_json: bool) -> int:
    async with opening as terminal:
        show({"pid": terminal.pid, "tag": terminal.tag}, as_json=as_json, text=printable(terminal.tag))
    return 0


async def _leave(opening: AbstractAsyncContextManager[LiveProcess], *, keep_open: bool, as_json: bool) -> int:
    async with opening as process:
        if not keep_open:
            await process.end()
        show({"pid": process.pid, "tag": process.tag}, as_json=as_json, text=printable(str(process.tag or process.pid)))
    return 0


def _terminal_again(
    sandbox: TrioSandbox, tag: str, offset: int, cols: int, rows: int
) -> AbstractAsyncContextManager[Terminal]:
    return sandbox.terminal_attach(tag, offset=offset, cols=cols, rows=rows)


def _program(command: Sequence[str], *, tty: bool) -> tuple[str, list[str]] | tuple[()]:
    """Program and arguments; nothing for a login shell."""
    words = list(command)
    if words and words[0] == "--":
        words = words[1:]
    elif words and words[0].startswith("-"):
        raise click.UsageError(f"{words[0]} stands before the sandbox: capsule exec {words[0]} SANDBOX -- COMMAND")
    if not words and not tty:
        raise click.UsageError("say what to run: capsule exec SANDBOX -- COMMAND; with -t alone it is a shell")
    return (words[0], words[1:]) if words else ()


def _check(
    *, tty: bool, as_json: bool, detach: bool, tag: str | None, timeout: int | None, interactive: bool, no_stdin: bool
) -> None:
    """Options that do not go together."""
    if interactive and no_stdin:
        raise click.UsageError("-i and -n contradict each other")
    if not tty:
        return
    for given, name in ((as_json and not detach, "--json"), (tag, "--tag"), (timeout, "--timeout"), (no_stdin, "-n")):
        if given:
            raise click.UsageError(f"{name} does not go with -t")
    if not detach and not stdio.is_terminal(stdio.STDIN):
        raise Failure(TERMINAL_NEEDED)


def _escapes(text: str) -> Escapes:
    if text == "none":
        return Escapes(None)
    if len(text) != 1 or not text.isascii() or not text.isprintable():
        raise click.UsageError("--escape is one character, or none")
    return Escapes(ord(text))


def _sends_stdin(*, interactive: bool, no_stdin: bool) -> bool:
    """As ssh sends it, but not what somebody types without having been asked."""
    return not no_stdin and (interactive or not stdio.is_terminal(stdio.STDIN))


def _with_term(variables: dict[str, str]) -> dict[str, str]:
    """The remote terminal is of the kind that ours is."""
    term = os.environ.get("TERM")
    return {"TERM": term, **variables} if term else variables
