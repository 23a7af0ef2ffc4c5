"""/v1/snapshots: the templates that sandboxes start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from capsule import errors
from capsule.http import cursors
from capsule.http.answers import Template
from capsule.http.bodies import ListSnapshotsQuery
from capsule.http.operations import Call, Operation, Success
from capsule.http.sandboxes import LINK, page_response

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.ports import TemplateService


def operations(service: TemplateService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return [
        Operation(
            name="listSnapshots",
            method="GET",
            path="/v1/snapshots",
            handler=SnapshotHandlers(service).list,
            summary="List templates",
            description="Newest first.",
            tag="snapshots",
            query=ListSnapshotsQuery,
            successes=(Success(status=200, description="A page.", body=list[Template], headers=LINK),),
            errors=(errors.DatabaseUnavailable,),
        )
    ]


class SnapshotHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: TemplateService) -> None:
        self._service = service

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
