"""The route table's rows for WebSockets. Quart serves them too: whoever sends a plain GET is told to upgrade."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
from quart_trio.wrappers import TrioResponse

from capsule import errors
from capsule.http import ids
from capsule.http.errors import error_response
from capsule.http.mounts import under_both_names
from capsule.http.operations import Call, Operation, Success
from capsule.http.ports import SandboxService
from capsule.http.sandboxes import ON_HOST
from capsule.http.sockets.handshake import UPGRADE
from capsule.http.sockets.websocket import WebSocket
from capsule.principals import Principal


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketCall:
    """One WebSocket to an operation. `query`: a struct of the operation's type."""

    socket: WebSocket
    principal: Principal
    sandbox: UUID
    path: Mapping[str, str]
    query: Any


Talk = Callable[[SocketCall], Awaitable[None]]
"""Returning ends the stream with 1000, a CapsuleError with its own code."""


class NoQuery(msgspec.Struct, forbid_unknown_fields=True):
    """A query string without parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOperation(Operation[Any, Any]):
    """A row of the route table that is a WebSocket."""

    talk: Talk


def socket_rows(
    service: SandboxService, talk: Talk, *, path: str, query: type[msgspec.Struct] = NoQuery, **texts: Any
) -> list[Operation[Any, Any]]:
    """A row under both names. `texts`: name, summary, description, tag, errors."""
    more = texts.pop("errors", ())
    row = SocketOperation(
        **texts,
        method="GET",
        path=f"/v1/sandboxes/{{sandbox_id}}/{path}",
        handler=_ToldToUpgrade(service).answer,
        talk=talk,
        query=query,
        successes=(
            Success(
                status=101, description="A WebSocket.", headers={"Upgrade": "`websocket`.", "Connection": "Upgrade"}
            ),
        ),
        errors=(*ON_HOST, errors.Forbidden, errors.UpgradeRequired, *more),
    )
    return under_both_names([row])


class _ToldToUpgrade:
    """The answer to a plain GET."""

    def __init__(self, service: SandboxService) -> None:
        self._service = service

    async def answer(self, call: Call[None, Any]) -> TrioResponse:
        await self._service.get(call.principal, call.sandbox)
        error = errors.UpgradeRequired("This is a WebSocket: connect with a client for WebSockets.")
        response = error_response(error, call.request.request_id)
        for name, value in {**UPGRADE, "Connection": "Upgrade"}.items():
            response.headers[name] = value
        return response


def check_running(status: str, sandbox: UUID) -> None:
    """InvalidState for a sandbox in which nothing can be done now."""
    if status != "running":
        raise errors.InvalidState(
            f"The sandbox {ids.sandbox_id(sandbox)} is {status}; resume it first."
            if status == "paused"
            else f"The sandbox {ids.sandbox_id(sandbox)} is {status}, not running."
        )
