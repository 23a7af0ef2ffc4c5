"""Watching files over a WebSocket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

from capsule.client.answers import FileEvent
from capsule.client.errors import StreamClosed
from capsule.client.sockets import Socket, converted, open_socket
from capsule.client.transport import Transport

NORMAL = 1000


class Watch:
    """What happens to a file or directory: `async for event in watch`. One task reads."""

    def __init__(self, socket: Socket, path: str) -> None:
        self._socket = socket
        self._path = path

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> FileEvent:
        """The next event, until what is watched is gone. StreamClosed, ConnectionLost."""
        while True:
            try:
                message = await self._socket.receive()
            except StreamClosed as exc:
                if exc.code != NORMAL:
                    raise
                raise StopAsyncIteration from None
            match message:
                case {"type": "event"}:
                    return converted(message, FileEvent)
                case {"type": "overflow"}:
                    return FileEvent(event="overflow", path=self._path)


@asynccontextmanager
async def opened(transport: Transport, files: str, path: str, *, recursive: bool) -> AsyncIterator[Watch]:
    """Watch; events from now on count."""
    async with open_socket(transport, f"{files}/watch") as socket:
        await socket.send_json({"type": "start", "path": path, "recursive": recursive})
        await socket.expect("started")
        yield Watch(socket, path)
