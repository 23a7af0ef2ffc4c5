"""/v1/sandboxes: create, list, look at, end, keep awake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import UNSET, UnsetType

from capsule import errors
from capsule.http import cursors, ids
from capsule.http.answers import Sandbox
from capsule.http.bodies import CreateSandboxBody, ListSandboxesQuery
from capsule.http.mounts import under_both_names
from capsule.http.operations import Call, Operation, Success, json_response, no_content
from capsule.model import CreateSandbox

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.ports import SandboxService
    from capsule.model import Page

T = TypeVar("T")

TAG = "sandboxes"
LINK = {"Link": 'The next page, as `<…>; rel="next"`; absent on the last one.'}

ON_HOST = (errors.NotFound, errors.InvalidState, errors.Busy, errors.HostUnavailable, errors.DatabaseUnavailable)
"""What everything can meet that reaches into a running sandbox."""


def operations(service: SandboxService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = SandboxHandlers(service)
    return under_both_names(
        [
            Operation(
                name="createSandbox",
                method="POST",
                path="/v1/sandboxes",
                handler=handlers.create,
                summary="Create a sandbox",
                description="Answers when the sandbox runs.",
                tag=TAG,
                body=CreateSandboxBody,
                body_optional=True,
                idempotent=True,
                successes=(Success(status=201, description="It runs.", body=Sandbox),),
                errors=(
                    errors.NotFound,
                    errors.QuotaExceeded,
                    errors.IdempotencyKeyReused,
                    errors.Conflict,
                    errors.DiskFull,
                    errors.InvalidState,
                    errors.SnapshotDamaged,
                    errors.NoHostsAvailable,
                    errors.HostUnavailable,
                    errors.Busy,
                    errors.DatabaseUnavailable,
                ),
            ),
            Operation(
                name="listSandboxes",
                method="GET",
                path="/v1/sandboxes",
                handler=handlers.list,
                summary="List sandboxes",
                description="Newest first, without stopped and failed ones unless `status` asks for them.",
                tag=TAG,
                query=ListSandboxesQuery,
                successes=(Success(status=200, description="A page.", body=list[Sandbox], headers=LINK),),
                errors=(errors.DatabaseUnavailable,),
            ),
            Operation(
                name="getSandbox",
                method="GET",
                path="/v1/sandboxes/{sandbox_id}",
                handler=handlers.get,
                summary="Look at a sandbox",
                description="Also a stopped one.",
                tag=TAG,
                successes=(Success(status=200, description="The sandbox.", body=Sandbox),),
                errors=(errors.NotFound, errors.DatabaseUnavailable),
            ),
            Operation(
                name="deleteSandbox",
                method="DELETE",
                path="/v1/sandboxes/{sandbox_id}",
                handler=handlers.destroy,
                summary="End a sandbox",
                description="Everything in it is lost. Ending it again changes nothing and succeeds.",
                tag=TAG,
                successes=(Success(status=204, description="It is stopped."),),
                errors=ON_HOST,
            ),
            Operation(
                name="pingSandbox",
                method="POST",
                path="/v1/sandboxes/{sandbox_id}/ping",
                handler=handlers.ping,
                summary="Keep a sandbox awake",
                description="Resets its idle clock.",
                tag=TAG,
                successes=(Success(status=204, description="The clock starts anew."),),
                errors=ON_HOST,
            ),
        ]
    )


class SandboxHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: SandboxService) -> None:
        self._service = service

    async def create(self, call: Call[CreateSandboxBody, None]) -> TrioResponse:
        body = call.body
        request = CreateSandbox(
            template=body.template,
            vcpus=optional(body.vcpus),
            memory_mb=optional(body.memory_mb),
            timeout_sec=body.timeout_sec,
            metadata=body.metadata,
            envs=body.envs,
        )
        view = await self._service.create(call.principal, request, call.request.idempotency_key())
        return json_response(Sandbox.of(view), 201, {"Location": f"{call.request.path}/{ids.sandbox_id(view.id)}"})

    async def list(self, call: Call[None, ListSandboxesQuery]) -> TrioResponse:
        query = call.query
        before = None if query.cursor is UNSET else cursors.parse_position(query.cursor)
        statuses = None if query.status is UNSET else frozenset(query.status)
        page = await self._service.list(call.principal, statuses, query.limit, before)
        kept = [("status", status) for status in sorted(statuses or ())]
        return page_response(
            [Sandbox.of(view) for view in page.items], page, call.request.path, [*kept, ("limit", str(query.limit))]
        )

    async def get(self, call: Call[None, None]) -> TrioResponse:
        return json_response(Sandbox.of(await self._service.get(call.principal, call.sandbox)))

    async def destroy(self, call: Call[None, None]) -> TrioResponse:
        await self._service.destroy(call.principal, call.sandbox)
        return no_content()

    async def ping(self, call: Call[None, None]) -> TrioResponse:
        await self._service.ping(call.principal, call.sandbox)
        return no_content()


def optional(value: T | UnsetType) -> T | None:
    """A field that was left out as None."""
    return None if value is UNSET else value


def page_response(items: list[Any], page: Page[Any], path: str, parameters: list[tuple[str, str]]) -> TrioResponse:
    """A bare array, the cursor of the next page in a Link header."""
    if page.after is None:
        return json_response(items)
    cursor = ("cursor", cursors.encode_position(page.after))
    return json_response(items, headers={"Link": cursors.next_link(path, [*parameters, cursor])})
