"""Pages about the server itself: health, readiness, metrics, the API's description and its viewer."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import trio
import yaml
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from quart_trio.wrappers import TrioResponse

from capsule import errors
from capsule.http import swagger
from capsule.http.answers import Health, Ready
from capsule.http.operations import Call, Operation, Success, json_response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from capsule.http.ports import Readiness

TAG = "system"

READY_TIMEOUT = 2.0
"""Seconds the database has to answer before we say that we are not ready."""

log = structlog.get_logger()

Page = Operation[None, None]


class SystemPages:
    """The pages; the document is published once the route table, with these in it, is complete."""

    def __init__(self, ready: Readiness, registry: CollectorRegistry, version: str) -> None:
        self._ready = ready
        self._registry = registry
        self._version = version
        self._json = b""
        self._yaml = b""
        self._assets = swagger.assets()

    def publish(self, document: dict[str, Any]) -> None:
        """Set what /openapi.json and /openapi.yaml answer."""
        self._json = msgspec.json.encode(document)
        self._yaml = _yaml_of(self._json)

    def operations(self) -> list[Operation[Any, Any]]:
        """The rows of the route table."""
        return [
            _page(
                "health",
                "/health",
                self.health,
                "Is the process there?",
                Success(status=200, description="It is.", body=Health),
            ),
            _page(
                "ready",
                "/ready",
                self.ready,
                "Can requests be served?",
                Success(status=200, description="The database answers.", body=Ready),
                failures=(errors.DatabaseUnavailable,),
            ),
            _page("metrics", "/metrics", self.metrics, "Metrics for Prometheus", _raw("text/plain")),
            _page("openapiJson", "/openapi.json", self.openapi_json, "This document", _raw("application/json")),
            _page("openapiYaml", "/openapi.yaml", self.openapi_yaml, "This document", _raw("application/yaml")),
            _page("docs", "/docs", self.docs, "This document, to read", _raw("text/html"), documented=False),
            _page("docsAsset", "/docs/assets/{asset}", self.asset, "Its parts", _raw("*/*"), documented=False),
        ]

    async def health(self, _call: Call[None, None]) -> TrioResponse:
        return json_response(Health(status="ok", version=self._version))

    async def ready(self, _call: Call[None, None]) -> TrioResponse:
        answers = False
        with trio.move_on_after(READY_TIMEOUT):
            try:
                answers = await self._ready()
            except Exception:
                log.exception("readiness_failed")
        if not answers:
            raise errors.DatabaseUnavailable("The database does not answer.", retry_after=READY_TIMEOUT)
        return json_response(Ready(status="ready"))

    async def metrics(self, _call: Call[None, None]) -> TrioResponse:
        return _bytes(generate_latest(self._registry), CONTENT_TYPE_LATEST)

    async def openapi_json(self, _call: Call[None, None]) -> TrioResponse:
        return _bytes(self._json, "application/json")

    async def openapi_yaml(self, _call: Call[None, None]) -> TrioResponse:
        return _bytes(self._yaml, "application/yaml")

    async def docs(self, _call: Call[None, None]) -> TrioResponse:
        response = _bytes(swagger.PAGE, "text/html; charset=utf-8")
        response.headers["Content-Security-Policy"] = swagger.CONTENT_SECURITY_POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    async def asset(self, call: Call[None, None]) -> TrioResponse:
        name = call.path["asset"]
        if name not in self._assets:
            raise errors.NotFound("There is no such part of the documentation.")
        response = _bytes(self._assets[name], swagger.MEDIA_TYPES[name])
        response.headers["Cache-Control"] = "public, max-age=3600"
        return response


@lru_cache(maxsize=1)
def _yaml_of(document: bytes) -> bytes:
    """The same as YAML. From the bytes: YAML would write a dict that occurs twice as an anchor and its references."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's is ten times faster, if it is there
    text: str = yaml.dump(msgspec.json.decode(document), Dumper=dumper, sort_keys=False, allow_unicode=True, width=110)
    return text.encode()


def _page(
    name: str,
    path: str,
    handler: Callable[[Call[None, None]], Awaitable[TrioResponse]],
    summary: str,
    success: Success,
    *,
    failures: tuple[type[errors.CapsuleError], ...] = (),
    documented: bool = True,
) -> Page:
    return Operation(
        name=name,
        method="GET",
        path=path,
        handler=handler,
        summary=summary,
        tag=TAG,
        successes=(success,),
        errors=failures,
        documented=documented,
    )


def _raw(media_type: str) -> Success:
    return Success(status=200, description="As it says.", media_type=media_type, raw=True)


def _bytes(content: bytes, content_type: str) -> TrioResponse:
    return TrioResponse(content, 200, {"Content-Type": content_type})
