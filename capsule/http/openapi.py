"""The OpenAPI 3.1 document, generated from the route table (docs/decisions/0004)."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import msgspec

from capsule import errors
from capsule.auth.access import Access, Credential
from capsule.http import fields, ids
from capsule.http.answers import FailedChild
from capsule.http.errors import Error
from capsule.http.operations import Operation, Success
from capsule.http.sockets.operations import SocketOperation

if TYPE_CHECKING:
    from collections.abc import Iterable

REF = "#/components/schemas/{name}"
REQUEST_ID = {
    "X-Request-Id": {
        "description": "Names this request in our log; yours, when you sent a short and plain one.",
        "schema": {"type": "string"},
    }
}
RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}
CHALLENGE = {"WWW-Authenticate": {"description": "What to send.", "schema": {"type": "string"}}}

PATH_PARAMETERS: dict[str, dict[str, str]] = {
    "sandbox_id": {"pattern": ids.SANDBOX_FORM, "description": "`sb-` and a UUID, or its 32 hex digits alone."},
    "host_id": {"pattern": ids.HOST_FORM, "description": "`host-` and a UUID."},
    "tag": {"pattern": fields.HOST_TAG, "description": "A tag of the host."},
    "key_id": {"pattern": ids.KEY_FORM, "description": "`key-` and a UUID."},
    "team_id": {"pattern": ids.TEAM_FORM, "description": "`team-` and a UUID."},
    "user_id": {"pattern": ids.USER_FORM, "description": "`usr-` and a UUID."},
    "name": {"pattern": fields.TEMPLATE_NAME, "description": "Name of a template."},
    "provider": {"pattern": r"^[a-z0-9]{1,32}$", "description": "An identity provider: `github`."},
    "process": {"pattern": fields.PROCESS, "description": "A pid, or the tag given to exec."},
}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "1 to 255 visible ASCII characters. The same key with the same request within 24 hours gets the "
    "first answer again; with another request 409.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[!-~]+$"},
}
SECURITY_SCHEMES = {
    Credential.API_KEY.value: {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "`cap_` and 40 hex digits; the same digits behind `e2b_` are the same key.",
    },
    Credential.SESSION.value: {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "`token` of the answer to a login; 6 hours.",
    },
    Credential.HOST.value: {
        "type": "apiKey",
        "in": "header",
        "name": "X-Host-Token",
        "description": "What a host got when it registered.",
    },
}
DESCRIPTION = """\
Capsule runs untrusted code in microVMs.

`/v1/sandboxes` and `/v1/capsules` are the same thing. JSON bodies may have 1 MiB and no unknown fields; text holds no
NUL characters. Lists take `limit` and `cursor`. Every failure is `{"error": {"code", "message", "request_id"}}`: act on
`code`, show `message`.

Operations marked `x-websocket` are WebSockets, which OpenAPI cannot describe: a plain GET answers 426, and their
descriptions say what is sent. Messages are JSON in text frames unless said, at most 1 MiB. Who cannot set headers sends
`{"type":"auth","token"}` first, within 5 seconds; credentials are never taken from the URL. Every end is a close frame:
1000 when it is done; 1001 when the server shuts down, connect again; 1002, 1003, 1007, 1009 for what may not be sent;
else 4000 and the HTTP status of the same refusal, with `<code>: <message>` as its reason and
`{"type":"error","code","data"}` before it."""


def document(table: Iterable[Operation[Any, Any]], version: str) -> dict[str, Any]:
    """The document for the documented rows of `table`."""
    rows = [row for row in table if row.documented]
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        paths[row.path][row.method.lower()] = _operation(row)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Capsule",
            "version": version,
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in sorted(dict.fromkeys(row.tag for row in rows), key="capsules".__eq__)],
        "paths": dict(paths),
        "components": {"schemas": _schemas(rows), "securitySchemes": SECURITY_SCHEMES},
    }


def _schemas(rows: list[Operation[Any, Any]]) -> dict[str, Any]:
    """Every named type: bodies, answers, and what they are made of."""
    bodies = [row.body for row in rows if row.body is not None]
    answers = [success.body for row in rows for success in row.successes if success.body is not None]
    _, components = msgspec.json.schema_components([*bodies, *answers, FailedChild, Error], ref_template=REF)
    return dict(sorted(components.items()))


def _operation(row: Operation[Any, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": row.name, "summary": row.summary, "tags": [row.tag]}
    if row.description:
        described["description"] = row.description
    parameters = [*_path_parameters(row.path), *_query_parameters(row.query)]
    if row.idempotent:
        parameters.append(IDEMPOTENCY_KEY)
    if parameters:
        described["parameters"] = parameters
    if row.body is not None or row.form:
        described["requestBody"] = _request_body(row)
    described["security"] = [{one.value: []} for one in Credential if one in row.access.credentials]
    described["responses"] = _responses(row)
    if isinstance(row, SocketOperation):
        described["x-websocket"] = True
    return described


def _path_parameters(path: str) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": PATH_PARAMETERS[name]["description"],
            "schema": {"type": "string", "pattern": PATH_PARAMETERS[name]["pattern"]},
        }
        for name in names
    ]


def _query_parameters(kind: type[msgspec.Struct] | None) -> list[dict[str, Any]]:
    if kind is None:
        return []
    _, components = msgspec.json.schema_components([kind], ref_template=REF)
    described = []
    for name, schema in components[kind.__name__]["properties"].items():
        text = schema.pop("description", "")
        described.append({"name": name, "in": "query", "required": False, "description": text, "schema": schema})
    return described


def _request_body(row: Operation[Any, Any]) -> dict[str, Any]:
    if row.body is not None:
        schema = _schema_of(row.body)
        return {"required": not row.body_optional, "content": {"application/json": {"schema": schema}}}
    schema = {
        "type": "object",
        "properties": {**row.form, **row.optional_form},
        "required": list(row.form),
        "additionalProperties": False,
    }
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _schema_of(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=REF)
    return schema


def _responses(row: Operation[Any, Any]) -> dict[str, Any]:
    found = {str(success.status): _success(success) for success in row.successes}
    by_status: dict[int, list[type[errors.CapsuleError]]] = defaultdict(list)
    for kind in dict.fromkeys((*row.errors, *_implied(row))):
        by_status[kind.status].append(kind)
    for status in sorted(by_status):
        found[str(status)] = _failure(by_status[status])
    return found


def _implied(row: Operation[Any, Any]) -> list[type[errors.CapsuleError]]:
    """What every operation of this shape can answer, whatever its use-case does."""
    kinds: list[type[errors.CapsuleError]] = [errors.InvalidRequest, errors.Internal]
    kinds += _refusals(row.access)
    if row.body is not None or row.form:
        kinds += [errors.RequestTimeout, errors.TooLarge, errors.UnsupportedMediaType]
    return kinds


def _refusals(access: Access) -> list[type[errors.CapsuleError]]:
    """What its row in the table of access can answer."""
    if not access.credentials:
        return []
    if Credential.HOST in access.credentials:
        return [errors.Unauthorized]
    kinds: list[type[errors.CapsuleError]] = [errors.Unauthorized, errors.DatabaseUnavailable]
    if access.team == "own" or Credential.API_KEY in access.credentials:
        kinds.append(errors.NoTeam)
    if Credential.API_KEY not in access.credentials:
        kinds.append(errors.Forbidden)
    if access.team in {"path", "host"}:
        kinds.append(errors.NotFound)
    return kinds


def _success(success: Success) -> dict[str, Any]:
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in success.headers.items()}
    described: dict[str, Any] = {"description": success.description, "headers": {**REQUEST_ID, **headers}}
    if success.raw:
        described["content"] = {name: {} for name in (success.media_type, success.or_media_type) if name}
    elif success.body is not None:
        described["content"] = {success.media_type: {"schema": _schema_of(success.body)}}
    return described


def _failure(kinds: list[type[errors.CapsuleError]]) -> dict[str, Any]:
    lines = [f"- `{kind.code}`: {_first_sentence(kind)}" for kind in kinds]
    headers: dict[str, Any] = dict(REQUEST_ID)
    if kinds[0].status in {429, 503}:
        headers |= RETRY_AFTER
    if kinds[0].status == 401:
        headers |= CHALLENGE
    return {
        "description": "\n".join(lines),
        "headers": headers,
        "content": {"application/json": {"schema": {"$ref": REF.format(name="Error")}}},
    }


def _first_sentence(kind: type[errors.CapsuleError]) -> str:
    return (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
