"""…/processes/{process}/stream: a process that was started before.

Owns: nothing; the process lives on. Owned by: `endpoint.SocketEndpoint`. Takes: input and control messages, from an
observer none. Emits: `start`, what was kept of the output, what follows, `exit`. Dies when: the process has ended,
somebody else has attached to it (an observer outlives that), or the socket ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from capsule import errors
from capsule.http.processes import parse_process
from capsule.http.sockets.following import follow
from capsule.http.sockets.framings import framing_of
from capsule.http.sockets.messages import ATTACHED, Framing, Offset, Started
from capsule.http.sockets.operations import SocketCall, socket_rows

if TYPE_CHECKING:
    from capsule.http.operations import Operation
    from capsule.http.ports import SandboxService
    from capsule.http.stream_ports import StreamService

DESCRIPTION = """\
To a process that was started with `detach` or `background`, or to a terminal; also when it has ended lately.

Server, first: `{"type":"start","pid","tag","pty","offset","skipped","replay","ended"}`: the output begins at byte
`offset` of all there was; `skipped` bytes that you asked for are gone; the first `replay` bytes were there before you
came, and when it has `ended` there will be no more. Then as …/exec/stream, for a terminal as …/pty. The client may
send `stdin` (a terminal: binary messages), `close_stdin`, `signal`, `resize`, `stop` at once; nothing has to be
started.

Who attaches takes over: the other socket is closed with 4409. With `observe=true` you only look on beside it."""


class AttachQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """From where on, and how."""

    offset: Offset | UnsetType = UNSET
    observe: Annotated[bool, Meta(description="Only look on.")] = False
    framing: Annotated[Framing, Meta(description="`json` unless given, `binary` for a terminal.")] | UnsetType = UNSET


def operations(service: StreamService, sandboxes: SandboxService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return socket_rows(
        sandboxes,
        Attachment(service).talk,
        path="processes/{process}/stream",
        query=AttachQuery,
        name="attachProcess",
        summary="Attach to a process",
        description=DESCRIPTION,
        tag="processes",
        errors=(errors.Conflict, errors.TooManyExecs),
    )


class Attachment:
    """Find it, then carry its streams."""

    def __init__(self, service: StreamService) -> None:
        self._service = service

    async def talk(self, call: SocketCall) -> None:
        query: AttachQuery = call.query
        name = parse_process(call.path["process"])
        offset = None if query.offset is UNSET else query.offset
        attaching = self._service.attach(call.principal, call.sandbox, name, offset=offset, observe=query.observe)
        async with attaching as process:
            await call.socket.send(
                Started(
                    pid=process.pid,
                    tag=process.tag,
                    pty=process.terminal,
                    offset=process.offset,
                    skipped=process.skipped,
                    replay=process.replay,
                    ended=process.ended,
                )
            )
            usual: Framing = "binary" if process.terminal else "json"
            chosen = usual if query.framing is UNSET else query.framing
            framing = framing_of(call.socket, chosen, terminal=process.terminal)
            await follow(call.socket, process, framing, ATTACHED, observe=query.observe)
