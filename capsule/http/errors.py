"""Failures as answers: the one place where an exception becomes a status, headers and `{"error": …}`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from quart_trio.wrappers import TrioResponse

from capsule import errors
from capsule.http.answers import Encoding, Output, printed

if TYPE_CHECKING:
    from werkzeug.exceptions import HTTPException

CHALLENGE = 'Bearer realm="capsule", ApiKey realm="capsule", header="X-API-Key"'
"""WWW-Authenticate of every 401."""

_BY_STATUS: dict[int, tuple[type[errors.CapsuleError], str]] = {
    404: (errors.NotFound, "There is nothing at this path; /docs lists what there is."),
    405: (errors.MethodNotAllowed, "This path has other methods; the Allow header lists them."),
    408: (errors.RequestTimeout, "The request did not arrive in time; send it again."),
    413: (errors.TooLarge, "The request is too large."),
    415: (errors.UnsupportedMediaType, "The body has a Content-Type that this operation does not take."),
    431: (errors.HeaderTooLarge, "The request line and headers are too large together."),
    503: (errors.Busy, "The server is busy; try again."),
}
"""What the layers below us (router, server) answer with a bare status, in our words."""


class Refusal(Struct, kw_only=True):
    """What went wrong. Some codes bring more fields; they stand beside these."""

    code: Annotated[str, Meta(description="For programs; one per cause.")]
    message: Annotated[str, Meta(description="For people: what happened and what to do.")]
    request_id: Annotated[str, Meta(description="Names this request in our log.")]
    field: Annotated[str, Meta(description="The field that was refused.")] | UnsetType = UNSET
    sandbox_ids: Annotated[list[str], Meta(description="Sandboxes that stand in the way.")] | UnsetType = UNSET
    stdout: Output | UnsetType = UNSET
    stderr: Output | UnsetType = UNSET
    encoding: Encoding | UnsetType = UNSET
    duration_ms: int | UnsetType = UNSET


class Error(Struct, kw_only=True):
    """The answer to every request that fails."""

    error: Refusal


def internal() -> errors.Internal:
    """What a client hears of a bug: nothing about it."""
    return errors.Internal("Something failed on our side. Try again; if it stays, report the request_id.")


def from_status(status: int) -> errors.CapsuleError:
    """The error for a status that came without one; 400 for other 4xx, Internal for other 5xx."""
    if status in _BY_STATUS:
        kind, message = _BY_STATUS[status]
        return kind(message)
    if status >= 500:
        return internal()
    return errors.InvalidRequest("The request is malformed.")


def error_body(error: errors.CapsuleError, request_id: str) -> bytes:
    """`{"error": {…}}` as JSON."""
    body: dict[str, Any] = {"code": error.code, "message": error.message, "request_id": request_id}
    if isinstance(error, errors.PartialOutput):
        body |= printed(error.stdout, error.stderr)
        body["duration_ms"] = error.duration_ms
    return msgspec.json.encode({"error": {**error.extra, **body}})


def error_headers(error: errors.CapsuleError) -> dict[str, str]:
    """Headers that go with an error's class."""
    headers = {"Content-Type": "application/json"}
    if error.status == 401:
        headers["WWW-Authenticate"] = CHALLENGE
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return headers


def error_response(error: errors.CapsuleError, request_id: str) -> TrioResponse:
    """The whole answer."""
    return TrioResponse(error_body(error, request_id), error.status, error_headers(error))


def from_router(found: HTTPException, request_id: str) -> TrioResponse:
    """The answer for a path or method that no operation has (Quart's router says so with a werkzeug exception)."""
    response = error_response(from_status(found.code or 500), request_id)
    methods = sorted(getattr(found, "valid_methods", None) or ())
    if methods:
        response.headers["Allow"] = ", ".join(methods)
    return response
