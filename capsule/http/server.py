"""Serve the application: hypercorn's protocol and connection code under an accept loop of ours.

Owns: the listening sockets and one task per connection.
Owned by: whoever awaits `serve`.
Takes: `shutdown` (stop accepting, finish what runs).
Dies when: all connections are done, at the latest `grace` seconds after `shutdown`; or cancelled, then at once.

hypercorn.trio.serve is not used itself, for four things it cannot do: end while a client does not read (its writes are
shielded without a limit), keep one broken connection from ending all others, bound the number of connections, and
answer malformed requests in our words.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any, cast

import structlog
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from capsule.errors import Busy
from capsule.http.errors import error_body, error_headers
from capsule.http.protocol import Http11
from capsule.http.streams import CLIENT, ClientStream

if TYPE_CHECKING:
    from hypercorn.typing import AppWrapper

    from capsule.http.app import Application
    from capsule.http.sockets.endpoint import SocketEndpoint

BACKLOG = 2048
"""Connections the kernel holds for us while we are busy; net.core.somaxconn may allow fewer."""

MAX_CONNECTIONS = 8192
"""More are told to come back: each costs about 100 KiB."""

SPARE_DESCRIPTORS = 2048
"""For all that is not a client: the database, hosts, files, threads."""

IDLE_TIMEOUT = 30
"""Seconds a connection may stay without a complete request head. Counted from the connection's start or its last
answer, not from its last byte: a client that sends one byte at a time gains nothing."""

MAX_HEAD_BYTES = 32 * 1024
"""Request line and headers."""

MAX_REQUESTS = 100_000
"""Requests on one connection."""

READ_BYTES = 64 * 1024
"""Taken off a socket at a time."""

BULK_BYTES = 256 * 1024
"""The same, once so much has come at a time: a piece of an upload costs a dozen hops, whatever its size."""

QUEUED_CHUNKS = 2
"""Pieces of a body (BULK_BYTES each at most) between the socket and the handler."""

log = structlog.get_logger()


async def serve(
    app: Application,
    bind: tuple[str, int],
    *,
    shutdown: trio.Event,
    grace: float,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen on `bind` (port 0: any free one) until `shutdown`; reports the bound port when it accepts.

    After `shutdown` idle connections and WebSockets close at once, requests have `grace` seconds to finish, then they
    are cancelled and their connections reset. OSError when the address cannot be bound.
    """
    host, port = bind
    _allow_descriptors()
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
    server = _Server(app)
    async with trio.open_nursery() as connections:
        try:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(_accept, server, listeners, connections)
                bound = listeners[0].socket.getsockname()[1]
                log.info("http_listening", host=host, port=bound)
                task_status.started(bound)
                await shutdown.wait()
                accepting.cancel_scope.cancel()
            log.info("http_draining", connections=server.open)
            await server.drain(grace)
        finally:
            server.cut()
            connections.cancel_scope.cancel()


async def _accept(server: _Server, listeners: list[trio.SocketListener], connections: trio.Nursery) -> None:
    await trio.serve_listeners(server.handle, listeners, handler_nursery=connections)


class _Server:
    """The connections that are open, and what they share."""

    def __init__(self, app: Application) -> None:
        self._app: AppWrapper = wrap_app(cast("Any", app), 0, "asgi")
        self._metrics = app.metrics
        self._sockets = app.sockets
        self._config = _config()
        self._context = WorkerContext(None)
        self._streams: set[ClientStream] = set()
        self._empty = trio.Event()

    @property
    def open(self) -> int:
        return len(self._streams)

    async def handle(self, raw: trio.SocketStream) -> None:
        """Serve one connection. Never raises but Cancelled: one client's end is nobody else's."""
        stream = ClientStream(raw)
        self._streams.add(stream)
        self._metrics.connections.set(self.open)
        try:
            if self.open > MAX_CONNECTIONS:
                await _refuse(stream)
            else:
                connection = _Connection(
                    self._app, self._config, self._context, ConnectionState({CLIENT: stream}), cast("Any", stream)
                )
                connection.sockets = self._sockets
                await connection
        except Exception:
            log.exception("connection_failed")
        finally:
            stream.cut()
            self._streams.discard(stream)
            self._metrics.connections.set(self.open)
            if not self._streams:
                self._empty.set()

    async def drain(self, grace: float) -> None:
        """Close what is idle, and wait up to `grace` seconds for the rest."""
        await self._context.terminated.set()
        with trio.move_on_after(grace):
            while self._streams:
                self._empty = trio.Event()
                await self._empty.wait()
        if self._streams:
            log.warning("http_cut_off", connections=self.open)

    def cut(self) -> None:
        """Reset all connections."""
        for stream in self._streams:
            stream.cut()


class _Connection(TCPServer):
    """hypercorn's connection, speaking our Http11, until it is a WebSocket."""

    sockets: SocketEndpoint

    async def _read_data(self) -> None:
        made = self.protocol
        made.protocol = protocol = Http11(
            made.app,
            made.config,
            made.context,
            made.task_group,
            made.state,
            made.ssl,
            made.client,
            made.server,
            made.send,
        )
        size = READ_BYTES
        try:
            while protocol.upgrade is None:
                data = bytes(await self.stream.receive_some(size))
                size = BULK_BYTES if len(data) >= READ_BYTES else READ_BYTES
                await made.handle(RawData(data))
                if not data:
                    break
            else:
                await self.idle_task.stop()
                await self.sockets.serve(cast("Any", self.stream), protocol.upgrade, self.context.terminated)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass
        await made.handle(Closed())
        # The client is gone; without this the task would sit out the idle time-out beside a closed socket.
        await self.idle_task.stop()


def _allow_descriptors() -> None:
    """Let this process open MAX_CONNECTIONS and more, as far as it may: the usual soft limit of 1024 is for programs
    that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        within = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, within), hard))


def _config() -> Config:
    config = Config()
    config.errorlog = None
    config.accesslog = None
    config.logger_class = _Log  # type: ignore[assignment]
    config.include_server_header = False
    config.keep_alive_timeout = IDLE_TIMEOUT
    config.keep_alive_max_requests = MAX_REQUESTS
    config.h11_max_incomplete_size = MAX_HEAD_BYTES
    config.max_app_queue_size = QUEUED_CHUNKS
    # No read_timeout: it would end a request that takes long, not only one that is sent slowly.
    config.read_timeout = None
    return config


async def _refuse(stream: ClientStream) -> None:
    error = Busy("Too many connections; try again.", retry_after=1)
    body = error_body(error, "none")
    headers = {**error_headers(error), "Content-Length": str(len(body)), "Connection": "close"}
    lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in headers.items())]
    head = "\r\n".join(lines) + "\r\n\r\n"
    with trio.move_on_after(1):
        await stream.send_all(head.encode() + body)
        await stream.send_eof()


class _Log:
    """What hypercorn has to say, as our events. Requests are logged by capsule.http.connection."""

    def __init__(self, config: Config) -> None:
        """Nothing: hypercorn passes its configuration."""

    async def access(self, request: Any, response: Any, request_time: float) -> None:
        """Not here."""

    async def exception(self, message: str, *_args: Any, **_more: Any) -> None:
        log.exception("hypercorn", said=message)  # noqa: LOG004 - hypercorn calls this from its handlers

    async def error(self, message: str, *_args: Any, **_more: Any) -> None:
        log.error("hypercorn", said=message)

    critical = error

    async def warning(self, message: str, *_args: Any, **_more: Any) -> None:
        log.warning("hypercorn", said=message)

    async def info(self, message: str, *_args: Any, **_more: Any) -> None:
        log.debug("hypercorn", said=message)

    debug = info
