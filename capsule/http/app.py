"""The application: every operation of the route table, mounted on Quart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from quart import request as current_request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from capsule.http import (
    accounts,
    api_keys,
    audit,
    execs,
    file_streams,
    files,
    fleet,
    hosts,
    lifecycle,
    oauth,
    openapi,
    platform,
    processes,
    sandboxes,
    snapshots,
    teams,
)
from capsule.http.client_address import ClientAddresses
from capsule.http.connection import ApiConnection
from capsule.http.dispatch import responder
from capsule.http.errors import from_router
from capsule.http.metrics import HttpMetrics
from capsule.http.requests import ApiRequest
from capsule.http.sockets import attachment, console, terminal, watching
from capsule.http.sockets.endpoint import SocketEndpoint
from capsule.http.sockets.origins import OriginRule
from capsule.http.spool import Spool
from capsule.http.system import SystemPages
from capsule.http.unread import UnreadAnswers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from prometheus_client import CollectorRegistry
    from quart_trio.wrappers import TrioResponse

    from capsule.http.client_address import Network
    from capsule.http.operations import Operation
    from capsule.http.people_ports import PeopleServices
    from capsule.http.ports import Authenticator, Services


class Application(QuartTrio):
    """The ASGI application, and beside it its WebSockets. It holds no state but its metrics; what it serves is in the
    services behind it."""

    asgi_http_class = ApiConnection  # type: ignore[assignment]
    request_class = ApiRequest
    sockets: SocketEndpoint

    def __init__(self, metrics: HttpMetrics, addresses: ClientAddresses) -> None:
        super().__init__(__name__, static_folder=None)
        self.metrics = metrics
        self.addresses = addresses
        self.routes: dict[str, str] = {}
        # No redirects: an unknown spelling of a path is an unknown path, with our kind of answer.
        self.url_map.merge_slashes = False
        self.url_map.redirect_defaults = False
        self.register_error_handler(HTTPException, self._refuse)

    def mount(self, operation: Operation[Any, Any], authenticator: Authenticator) -> None:
        """Register one operation under its path."""
        respond = responder(operation, authenticator)

        async def view(**path: str) -> TrioResponse:
            return await respond(_request(), path)

        endpoint = f"{operation.method} {operation.path}"
        self.routes[endpoint] = operation.path
        self.add_url_rule(
            operation.path.replace("{", "<").replace("}", ">"),
            endpoint,
            view,
            methods=[operation.method],
            provide_automatic_options=False,
        )

    async def _refuse(self, found: Exception) -> TrioResponse:
        return from_router(cast("HTTPException", found), _request().request_id)


def create_app(
    services: Services,
    *,
    registry: CollectorRegistry,
    version: str,
    spool_dir: Path,
    trusted_proxies: Sequence[Network] = (),
    origins: OriginRule | None = None,
) -> Application:
    """Build the application. `registry` takes its metrics and is served whole under /metrics; uploads wait for their
    last byte in unnamed files in `spool_dir` (on a disk, not a tmpfs). `origins`: whose pages may open WebSockets;
    None: those of the host that the request was sent to."""
    app = Application(HttpMetrics(registry), ClientAddresses(trusted_proxies))
    pages = SystemPages(services.ready, registry, version)
    table = [*resources(services, Spool(spool_dir)), *pages.operations()]
    pages.publish(openapi.document(table, version))
    for operation in table:
        app.mount(operation, services.authenticator)
    app.sockets = SocketEndpoint(
        table, services.authenticator, services.sandboxes, origins or OriginRule(), app.metrics
    )
    return app


def resources(services: Services, spool: Spool) -> list[Operation[Any, Any]]:
    """The route table of the resources."""
    unread = UnreadAnswers()
    return [
        *sandboxes.operations(services.sandboxes),
        *lifecycle.operations(services.sandboxes),
        *execs.operations(services.sandboxes, unread),
        *processes.operations(services.sandboxes),
        *files.operations(services.sandboxes, spool, unread),
        *file_streams.operations(services.streams, services.sandboxes, spool),
        *console.operations(services.streams, services.sandboxes),
        *terminal.operations(services.streams, services.sandboxes),
        *attachment.operations(services.streams, services.sandboxes),
        *watching.operations(services.streams, services.sandboxes),
        *snapshots.operations(services.templates),
        *hosts.operations(services.hosts),
        *fleet.operations(services.fleet),
        *_people(services.people),
    ]


def _people(services: PeopleServices) -> list[Operation[Any, Any]]:
    return [
        *accounts.operations(services.accounts),
        *oauth.operations(services.oauth),
        *teams.operations(services.teams),
        *api_keys.operations(services.api_keys),
        *audit.operations(services.audit),
        *platform.operations(services.platform),
    ]


def _request() -> ApiRequest:
    """Quart's current request; ours by `request_class`."""
    return cast("ApiRequest", current_request._get_current_object())  # type: ignore[attr-defined]  # noqa: SLF001
