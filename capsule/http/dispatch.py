"""From a routed request to its handler and back: authenticate, parse, call, and turn failures into answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from capsule.auth.access import Credential, admit
from capsule.errors import CapsuleError
from capsule.http import credentials
from capsule.http.errors import error_response, internal
from capsule.http.operations import Call, Operation
from capsule.http.parsing import check_json_headers, parse_json, parse_query
from capsule.principals import User

if TYPE_CHECKING:
    import msgspec
    from quart_trio.wrappers import TrioResponse

    from capsule.http.ports import Authenticator
    from capsule.http.requests import ApiRequest
    from capsule.principals import Asker

log = structlog.get_logger()

USERS_CREDENTIALS = frozenset({Credential.API_KEY, Credential.SESSION})

Respond = Callable[["ApiRequest", dict[str, str]], Awaitable["TrioResponse"]]


def responder(operation: Operation[Any, Any], authenticator: Authenticator) -> Respond:
    """The function that answers requests to `operation`. It never raises but Cancelled."""

    async def respond(request: ApiRequest, path: dict[str, str]) -> TrioResponse:
        try:
            return await _respond(operation, authenticator, request, path)
        except CapsuleError as err:
            return error_response(err, request.request_id)
        except Exception:
            log.exception("request_failed", operation=operation.name)
            return error_response(internal(), request.request_id)

    return respond


async def _respond(
    operation: Operation[Any, Any], authenticator: Authenticator, request: ApiRequest, path: dict[str, str]
) -> TrioResponse:
    # Who asks comes first: a stranger learns nothing from our parser, and none of his bytes is read.
    ask = partial(_asker, operation, authenticator, request)
    asker = await ask()
    late = not request.body.arrived
    strict = operation.query if not operation.lenient_query else None
    query = None if strict is None else parse_query(request.query_string, strict)
    raw = None if operation.body is None else await request.json_bytes()
    if raw is not None and late:
        asker = await ask()  # whoever it was may have lost what lets them in while their body came
    body = None if raw is None else _parsed(operation, request, raw)
    return await operation.handler(
        Call(request=request, path=path, body=body, query=query, asker=asker, ask_again=ask),
    )


async def _asker(operation: Operation[Any, Any], authenticator: Authenticator, request: ApiRequest) -> Asker | None:
    access = operation.access
    if not access.credentials & USERS_CREDENTIALS:
        return None  # a host's token is its handler's to check
    asker = await credentials.authenticate(request.headers, access, authenticator)
    structlog.contextvars.bind_contextvars(**_names(asker))
    admit(access, asker)
    return asker


def _names(asker: Asker) -> dict[str, str]:
    """What log events about this request are bound to."""
    if isinstance(asker, User):
        return {"user_id": str(asker.id), **({"team_id": str(asker.team_id)} if asker.team_id else {})}
    return {"key_id": str(asker.actor_id), "team_id": str(asker.team_id)}


def _parsed(operation: Operation[Any, Any], request: ApiRequest, raw: bytes) -> msgspec.Struct | None:
    if operation.body is None:
        return None
    if not raw and operation.body_optional:
        return operation.body()
    check_json_headers(request.headers)
    return parse_json(raw, operation.body)
