"""Requests for WebSockets, from the head to the last byte: routed, admitted, upgraded or refused, run, counted, logged.

Owns: one connection after the request's head was read. Owned by: `server`'s task for that connection. Dies when: the
stream has ended and the connection is closed. What is known to be wrong before the upgrade is an ordinary HTTP answer.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl
from uuid import UUID

import structlog
import trio

from capsule.errors import CapsuleError, Forbidden, InvalidRequest, NotFound, TooManyExecs
from capsule.http import ids
from capsule.http.errors import internal
from capsule.http.parsing import parse_query
from capsule.http.requests import ID_FORM
from capsule.http.sockets.admission import Admission, Admitted
from capsule.http.sockets.handshake import UpgradeRequest, accepting, refusing
from capsule.http.sockets.operations import SocketCall, SocketOperation, check_running
from capsule.http.sockets.websocket import STALL_TIMEOUT, ByteStream, Waitable, WebSocket

if TYPE_CHECKING:
    from capsule.http.metrics import HttpMetrics
    from capsule.http.operations import Operation
    from capsule.http.ports import Authenticator, SandboxService
    from capsule.http.sockets.origins import OriginRule

LINGER = 1.0
"""Seconds for a refused client to read the answer and hang up."""

TEAM_STREAMS = 2048
"""WebSockets of one team at once: a quarter of the connections that the server has for everybody."""

IN_URL = frozenset({"token", "api_key", "apikey", "access_token", "key"})
"""What is not taken from a URL: those end in logs, histories and Referer headers."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Route:
    form: re.Pattern[str]
    row: SocketOperation
    admission: Admission

    @property
    def kind(self) -> str:
        return self.row.alias_of or self.row.name


class SocketEndpoint:
    """All WebSockets of an application."""

    def __init__(
        self,
        table: Iterable[Operation[Any, Any]],
        authenticator: Authenticator,
        sandboxes: SandboxService,
        origins: OriginRule,
        metrics: HttpMetrics,
    ) -> None:
        self._sandboxes = sandboxes
        self._origins = origins
        self._metrics = metrics
        self._open_of: Counter[UUID] = Counter()
        self._routes = [
            _Route(_form(row.path), row, Admission(row.access, authenticator))
            for row in table
            if isinstance(row, SocketOperation)
        ]

    async def serve(self, stream: ByteStream, request: UpgradeRequest, closing: Waitable) -> None:
        """Answer `request` on `stream`, and be its WebSocket until that ends; `closing` ends it."""
        sent = request.headers.get("X-Request-Id", "")
        request_id = sent if ID_FORM.fullmatch(sent) else secrets.token_hex(16)
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            started = trio.current_time()
            route, path = self._route(request.path)
            name = "unmatched" if route is None else route.row.path
            with self._metrics.in_flight.track_inprogress():
                opened = await self._open(route, path, request)
                error = opened if isinstance(opened, CapsuleError) else None
                answer = accepting(request.key(), request_id) if error is None else refusing(error, request_id)
                self._record(name, 101 if error is None else error.status, started)
                await stream.send_all(answer)
            if isinstance(opened, _Opened):
                await self._run(stream, opened, request, closing)
            else:
                await _hang_up(stream)

    def _route(self, path: str) -> tuple[_Route | None, dict[str, str]]:
        for route in self._routes:
            if match := route.form.fullmatch(path):
                return route, match.groupdict()
        return None, {}

    async def _open(
        self, route: _Route | None, path: dict[str, str], request: UpgradeRequest
    ) -> _Opened | CapsuleError:
        try:
            return await self._opened(route, path, request)
        except CapsuleError as err:
            return err
        except Exception:
            log.exception("request_failed")
            return internal()

    async def _opened(self, route: _Route | None, path: dict[str, str], request: UpgradeRequest) -> _Opened:
        request.key()
        if route is None:
            raise NotFound("There is no WebSocket at this path; /docs lists what there is.")
        _refuse_credentials_in_url(request.query_string)
        if not self._origins.admits(request.headers.getlist("Origin"), request.headers.get("Host", "")):
            raise Forbidden("Pages of this origin may not connect; CAPSULE_ALLOWED_ORIGINS lists those that may.")
        admitted = await route.admission.by_headers(request.headers)
        return _Opened(route, path, None if admitted is None else await self._found(route, path, admitted, request))

    async def _found(self, route: _Route, path: dict[str, str], admitted: Admitted, request: UpgradeRequest) -> _Found:
        """What the request names; InvalidRequest, NotFound, InvalidState."""
        sandbox = ids.parse_sandbox_id(path["sandbox_id"])
        kind = route.row.query
        query = None if kind is None else parse_query(request.query_string, kind)
        check_running((await self._sandboxes.get(admitted.principal, sandbox)).status, sandbox)
        return _Found(admitted, sandbox, query)

    async def _run(self, stream: ByteStream, opened: _Opened, request: UpgradeRequest, closing: Waitable) -> None:
        socket = WebSocket(stream, request.early)
        kind, started = opened.route.kind, trio.current_time()
        with self._metrics.stream(kind):
            try:
                await socket.run(partial(self._talk, opened, request), closing)
            finally:
                end = socket.end
                code = None if end is None else end.code
                self._metrics.stream_ended(kind, code)
                log.info(
                    "stream_ended",
                    route=opened.route.row.path,
                    code=code,
                    duration_ms=round((trio.current_time() - started) * 1000, 3),
                    bytes_in=socket.received,
                    bytes_out=socket.sent,
                )

    async def _talk(self, opened: _Opened, request: UpgradeRequest, socket: WebSocket) -> None:
        admission, found = opened.route.admission, opened.found
        if found is None:
            admitted = await admission.by_message(socket)
            found = await self._found(opened.route, opened.path, admitted, request)
        socket.patience = STALL_TIMEOUT
        by = found.admitted.principal
        call = SocketCall(socket=socket, principal=by, sandbox=found.sandbox, path=opened.path, query=found.query)
        with self._place(by.team_id):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(admission.watch_over, socket, found.admitted)
                await opened.route.row.talk(call)
                nursery.cancel_scope.cancel()

    @contextmanager
    def _place(self, team: UUID) -> Iterator[None]:
        """One of a team's TEAM_STREAMS. TooManyExecs."""
        if self._open_of[team] >= TEAM_STREAMS:
            raise TooManyExecs(f"Your team has {TEAM_STREAMS} streams open here; close one of them and try again.")
        self._open_of[team] += 1
        try:
            yield
        finally:
            self._open_of[team] -= 1
            if not self._open_of[team]:
                del self._open_of[team]

    def _record(self, route: str, status: int, started: float) -> None:
        seconds = trio.current_time() - started
        self._metrics.observe("GET", route, status, seconds)
        log.info("http_request", method="GET", route=route, status=status, duration_ms=round(seconds * 1000, 3))


@dataclass(frozen=True, slots=True)
class _Found:
    """Who asks, and for what."""

    admitted: Admitted
    sandbox: UUID
    query: Any


@dataclass(frozen=True, slots=True)
class _Opened:
    """A request that may be upgraded. `found` None: the first message says who asks."""

    route: _Route
    path: dict[str, str]
    found: _Found | None


def _form(template: str) -> re.Pattern[str]:
    """Of the paths that a template such as `/v1/sandboxes/{sandbox_id}/pty` stands for."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(template)))


def _refuse_credentials_in_url(query: bytes) -> None:
    names = {name.lower() for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)}
    if names & IN_URL:
        raise InvalidRequest("Credentials do not belong into a URL: send a header, or an `auth` message first.")


async def _hang_up(stream: ByteStream) -> None:
    """So that the client reads the answer before it sees the connection end."""
    try:
        with trio.move_on_after(LINGER):
            await stream.send_eof()
            while await stream.receive_some(65536):
                pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
