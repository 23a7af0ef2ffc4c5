"""…/pty: a terminal in the sandbox.

Owns: nothing that outlives the socket; the terminal is the sandbox's and lives on. Owned by: `endpoint.SocketEndpoint`.
Takes: `start` or `connect`, then what is typed and control messages. Emits: `started`, output, `exit`. Dies when: the
program in the terminal has ended, somebody else has connected to it, or the socket ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from capsule import errors
from capsule.http.parsing import check_path
from capsule.http.processes import parse_process
from capsule.http.sockets.following import first, follow
from capsule.http.sockets.framings import framing_of
from capsule.http.sockets.messages import TERMINAL, TerminalConnect, TerminalStart, TerminalStarted
from capsule.http.sockets.operations import SocketCall, socket_rows
from capsule.model import StreamCall, TerminalSize

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from capsule.http.operations import Operation
    from capsule.http.ports import SandboxService
    from capsule.http.stream_ports import ProcessStream, StreamService

DESCRIPTION = """\
Client, first: `{"type":"start"}` with `cmd?` (the user's login shell unless given), `args?`, `cols?` 80, `rows?` 24,
`envs?`, `cwd?`, `user?`, `tag?`, `framing?`, or `{"type":"connect","tag"}` with `offset?` (bytes of output that you
have), `cols?`, `rows?`, `framing?`. Then binary messages, which are typed as they are, and
`{"type":"resize","cols","rows"}`, `{"type":"signal","signal"}`, `{"type":"kill"}`. Neither waits behind input that
nobody reads.

Server: `{"type":"started","tag","pid","offset","skipped"}`, binary messages with the terminal's output, and last
`{"type":"exit","exit_code","signal"?,"duration_ms"}`. Connecting replays the scrollback, or what followed `offset`;
`skipped` bytes of it are gone. With `framing: json` both directions are text: `{"type":"input"|"output","data"}` in
base64.

The terminal lives on when the socket closes; `kill` ends it. Who connects takes over: the other socket is closed with
4409."""


def operations(service: StreamService, sandboxes: SandboxService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return socket_rows(
        sandboxes,
        Terminal(service).talk,
        path="pty",
        name="openTerminal",
        summary="Open a terminal",
        description=DESCRIPTION,
        tag="exec",
        errors=(errors.Conflict, errors.TooManyExecs),
    )


class Terminal:
    """Open or find it, then carry its bytes."""

    def __init__(self, service: StreamService) -> None:
        self._service = service

    async def talk(self, call: SocketCall) -> None:
        wanted: TerminalStart | TerminalConnect = await first(
            call.socket,
            TERMINAL,
            TerminalStart | TerminalConnect,  # type: ignore[arg-type]
        )
        async with self._attached(call, wanted) as process:
            if not process.terminal:
                raise errors.InvalidRequest("This process has no terminal: …/processes/{tag}/stream attaches to it.")
            if isinstance(wanted, TerminalConnect) and wanted.cols is not UNSET and wanted.rows is not UNSET:
                await process.resize(TerminalSize(wanted.cols, wanted.rows))
            await call.socket.send(
                TerminalStarted(tag=process.tag, pid=process.pid, offset=process.offset, skipped=process.skipped)
            )
            await follow(call.socket, process, framing_of(call.socket, wanted.framing, terminal=True), TERMINAL)

    def _attached(
        self, call: SocketCall, wanted: TerminalStart | TerminalConnect
    ) -> AbstractAsyncContextManager[ProcessStream]:
        if isinstance(wanted, TerminalStart):
            return self._service.exec(call.principal, call.sandbox, stream_call(wanted))
        return self._service.attach(
            call.principal,
            call.sandbox,
            parse_process(wanted.tag),
            offset=None if wanted.offset is UNSET else wanted.offset,
            observe=False,
        )


def stream_call(start: TerminalStart) -> StreamCall:
    """What the use-case takes."""
    return StreamCall(
        cmd=None if start.cmd is UNSET else start.cmd,
        args=None if start.args is UNSET else tuple(start.args),
        envs=start.envs,
        cwd=None if start.cwd is UNSET else check_path(start.cwd, "cwd"),
        user=None if start.user is UNSET else start.user,
        detach=True,
        terminal=TerminalSize(start.cols, start.rows),
        tag=None if start.tag is UNSET else start.tag,
    )
