"""/v1/snapshots: the templates that sandboxes start from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from capsule import errors
from capsule.http import cursors, fields, ids
from capsule.http.answers import Template
from capsule.http.bodies import CreateSnapshotBody, ListSnapshotsQuery
from capsule.http.lifecycle import ON_SNAPSHOT
from capsule.http.operations import Call, Operation, Success, json_response, no_content
from capsule.http.sandboxes import LINK, optional, page_response
from capsule.model import CreateSnapshot

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.ports import TemplateService

TAG = "snapshots"
PATH = "/v1/snapshots"


def operations(service: TemplateService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = SnapshotHandlers(service)
    return [
        Operation(
            name="createSnapshot",
            method="POST",
            path=PATH,
            handler=handlers.create,
            summary="Make a template of a sandbox",
            description="Memory, processes and disk of this moment, under a name; any number of sandboxes start from "
            "it. A running sandbox runs on unless `pause` says otherwise.",
            tag=TAG,
            body=CreateSnapshotBody,
            idempotent=True,
            successes=(Success(status=201, description="The template.", body=Template),),
            errors=(*ON_SNAPSHOT, errors.QuotaExceeded, errors.IdempotencyKeyReused),
        ),
        Operation(
            name="listSnapshots",
            method="GET",
            path=PATH,
            handler=handlers.list,
            summary="List templates",
            description="Newest first.",
            tag=TAG,
            query=ListSnapshotsQuery,
            successes=(Success(status=200, description="A page.", body=list[Template], headers=LINK),),
            errors=(errors.DatabaseUnavailable,),
        ),
        Operation(
            name="deleteSnapshot",
            method="DELETE",
            path=f"{PATH}/{{name}}",
            handler=handlers.delete,
            summary="Delete a template",
            description="Of your team's; 409 `in_use` names the sandboxes that live or rest and were made from it.",
            tag=TAG,
            successes=(Success(status=204, description="It is gone."),),
            errors=(errors.NotFound, errors.Forbidden, errors.InUse, errors.Busy, errors.DatabaseUnavailable),
        ),
    ]


class SnapshotHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: TemplateService) -> None:
        self._service = service

    async def create(self, call: Call[CreateSnapshotBody, None]) -> TrioResponse:
        body = call.body
        request = CreateSnapshot(
            sandbox=ids.parse_sandbox_id(body.sandbox_id), name=optional(body.name), pause=body.pause
        )
        view = await self._service.create(call.principal, request, call.request.idempotency_key())
        return json_response(Template.of(view), 201, {"Location": f"{PATH}/{view.name}"})

    async def delete(self, call: Call[None, None]) -> TrioResponse:
        name = call.path["name"]
        if not re.fullmatch(fields.TEMPLATE_NAME, name):
            raise errors.InvalidRequest("name: not the name of a template.", field="name")
        await self._service.delete(call.principal, name)
        return no_content()

    async def list(self, call: Call[None, ListSnapshotsQuery]) -> TrioResponse:
        query = call.query
        before = None if query.cursor is UNSET else cursors.parse_position(query.cursor)
        kind = None if query.type is UNSET else query.type
        page = await self._service.list(call.principal, kind, query.limit, before)
        kept = [("type", kind)] if kind else []
        return page_response(
            [Template.of(view) for view in page.items],
            page,
            call.request.path,
            [*kept, ("limit", str(query.limit))],
        )
