"""…/exec/stream: a command with its streams connected.

Owns: the process, unless it is detached. Owned by: `endpoint.SocketEndpoint`. Takes: `start`, then input and control
messages. Emits: `start`, output, `exit`. Dies when: the process has ended, or the socket; that kills the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from capsule import errors
from capsule.http.parsing import check_path
from capsule.http.sockets.following import first, follow
from capsule.http.sockets.framings import framing_of
from capsule.http.sockets.messages import EXEC, ExecStart, Started
from capsule.http.sockets.operations import SocketCall, socket_rows
from capsule.model import StreamCall

if TYPE_CHECKING:
    from capsule.http.operations import Operation
    from capsule.http.ports import SandboxService
    from capsule.http.stream_ports import StreamService

DESCRIPTION = """\
Client, first: `{"type":"start","cmd",…}` with `args?`, `envs?`, `cwd?`, `user?`, `timeout_sec?` (none unless given),
`detach?`, `tag?` as in POST …/exec, and `framing?` (`json` or `binary`). Then any of `{"type":"stdin","data"}` (or
`data_b64`), `{"type":"close_stdin"}`, `{"type":"signal","signal"}`, `{"type":"stop"}` (SIGKILL to the process group).
Signals never wait behind input that the process does not read.

Server: `{"type":"start","pid","tag"}`, `{"type":"stdout"|"stderr","data"}` - characters are never split; bytes that
are no UTF-8 come as `data_b64` - and last `{"type":"exit","exit_code","signal"?,"timed_out"?,"duration_ms"}`. With
`framing: binary` output comes as binary messages, of which the first byte is 1 or 2 and the rest the bytes; input may
be sent as binary messages with the first byte 0.

Output is not dropped: a client that reads slowly slows the process down. When the socket closes the process group is
killed; with `detach` it lives on, and …/processes/{tag}/stream attaches to it."""


def operations(service: StreamService, sandboxes: SandboxService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return socket_rows(
        sandboxes,
        Console(service).talk,
        path="exec/stream",
        name="execStream",
        summary="Run a command and talk to it",
        description=DESCRIPTION,
        tag="exec",
        errors=(errors.Conflict, errors.TooManyExecs),
    )


class Console:
    """Start it, then carry its streams."""

    def __init__(self, service: StreamService) -> None:
        self._service = service

    async def talk(self, call: SocketCall) -> None:
        start = await first(call.socket, EXEC, ExecStart)
        async with self._service.exec(call.principal, call.sandbox, stream_call(start)) as process:
            await call.socket.send(Started(pid=process.pid, tag=process.tag))
            await follow(call.socket, process, framing_of(call.socket, start.framing, terminal=False), EXEC)


def stream_call(start: ExecStart) -> StreamCall:
    """What the use-case takes."""
    return StreamCall(
        cmd=start.cmd,
        args=None if start.args is UNSET else tuple(start.args),
        envs=start.envs,
        cwd=None if start.cwd is UNSET else check_path(start.cwd, "cwd"),
        user=None if start.user is UNSET else start.user,
        timeout_sec=None if start.timeout_sec is UNSET else start.timeout_sec,
        detach=start.detach,
        tag=None if start.tag is UNSET else start.tag,
    )
