"""…/files/watch: what happens to a file or directory.

Owns: the watch. Owned by: `endpoint.SocketEndpoint`. Takes: `start`, then at most `stop`. Emits: `started`, `event`,
`overflow`, `end`. Dies when: what is watched is gone, the client says `stop`, or the socket ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio
from msgspec import UNSET

from capsule import errors
from capsule.http.parsing import check_path
from capsule.http.sockets.ends import UnexpectedFrame
from capsule.http.sockets.following import first
from capsule.http.sockets.messages import WATCH, Happened, Overflow, Stop, WatchEnd, WatchStart, WatchStarted
from capsule.http.sockets.operations import SocketCall, socket_rows

if TYPE_CHECKING:
    from capsule.http.operations import Operation
    from capsule.http.ports import SandboxService
    from capsule.http.sockets.websocket import WebSocket
    from capsule.http.stream_ports import StreamService
    from capsule.model import FileEvent

DESCRIPTION = """\
Client, first: `{"type":"start","path","recursive"?}`; later at most `{"type":"stop"}`.

Server: `{"type":"started"}` - what happens from then on is told -,
`{"type":"event","event","path","to"?,"directory"?}` with `event` one of create, write, remove, rename, chmod,
`{"type":"overflow"}` when more happened than is told (look for yourself), and `{"type":"end","reason":"removed"}`
when what is watched is gone."""


def operations(service: StreamService, sandboxes: SandboxService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return socket_rows(
        sandboxes,
        Watching(service).talk,
        path="files/watch",
        name="watchFiles",
        summary="Watch a file or directory",
        description=DESCRIPTION,
        tag="files",
        errors=(errors.FileNotFound, errors.PermissionDenied, errors.TooManyExecs),
    )


class Watching:
    """Set the watch, then tell what it sees."""

    def __init__(self, service: StreamService) -> None:
        self._service = service

    async def talk(self, call: SocketCall) -> None:
        start = await first(call.socket, WATCH, WatchStart)
        watching = self._service.watch(call.principal, call.sandbox, check_path(start.path), recursive=start.recursive)
        async with watching as seen:
            await call.socket.send(WatchStarted())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_stopped, call.socket, nursery.cancel_scope)
                async for events in seen:
                    for event in events.events:
                        await call.socket.send(_happened(event))
                    if events.overflow:
                        await call.socket.send(Overflow())
                await call.socket.send(WatchEnd(reason="removed"))
                nursery.cancel_scope.cancel()


async def _until_stopped(socket: WebSocket, scope: trio.CancelScope) -> None:
    message = await socket.receive()
    if not message.text:
        raise UnexpectedFrame
    if not isinstance(WATCH.parse(message.data), Stop):
        raise errors.InvalidRequest("A watch is started once; `stop` ends it.", field="type")
    scope.cancel()


def _happened(event: FileEvent) -> Happened:
    return Happened(
        event=event.event,
        path=event.path,
        to=UNSET if event.to is None else event.to,
        directory=event.directory,
    )
