"""/v1/hosts: what operators do with hosts. What agents call is in capsule.http.hosts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from capsule import errors
from capsule.fleet.views import WantedHost
from capsule.http import cursors, fields, ids
from capsule.http.fleet_bodies import (
    CreatedHost,
    CreateHostBody,
    DeleteHostQuery,
    HostDeletion,
    HostPageQuery,
    Hosts,
    HostTagBody,
    HostTags,
    HostToken,
)
from capsule.http.hosts import TAG
from capsule.http.operations import Call, Operation, Success, json_response, no_content
from capsule.http.platform import AnyHost

if TYPE_CHECKING:
    from uuid import UUID

    from quart_trio.wrappers import TrioResponse

    from capsule.http.fleet_port import FleetService

PATH = "/v1/hosts"
HOST_PATH = f"{PATH}/{{host_id}}"
_TAG = re.compile(fields.HOST_TAG)


def operations(service: FleetService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = FleetHandlers(service)
    return [*_hosts(handlers), *_tags(handlers), *_closing(handlers)]


def _hosts(handlers: FleetHandlers) -> list[Operation[Any, Any]]:
    return [
        Operation(
            name="createHost",
            method="POST",
            path=PATH,
            handler=handlers.create,
            summary="Make a host known",
            description="It is `pending` until a machine joins with the token: once, within an hour. Regular hosts are "
            "for platform admins, BYOC hosts for admins of a team that brings its own. The token is not kept, so a "
            "request that is sent again with its Idempotency-Key makes no second host but gets a fresh token for the "
            "first one, and the token before it is void; once a machine has joined, 409.",
            tag=TAG,
            body=CreateHostBody,
            idempotent=True,
            successes=(Success(status=201, description="The host and its token.", body=CreatedHost),),
            errors=(
                errors.NoTeam,
                errors.QuotaExceeded,
                errors.Conflict,
                errors.IdempotencyKeyReused,
                errors.TokensUnavailable,
            ),
        ),
        Operation(
            name="listHosts",
            method="GET",
            path=PATH,
            handler=handlers.list,
            summary="List hosts",
            description="Newest first. Platform admins see all, others those of their session's team.",
            tag=TAG,
            query=HostPageQuery,
            successes=(Success(status=200, description="A page.", body=Hosts),),
            errors=(errors.NoTeam,),
        ),
        Operation(
            name="getHost",
            method="GET",
            path=HOST_PATH,
            handler=handlers.get,
            summary="Look at a host",
            tag=TAG,
            successes=(Success(status=200, description="The host.", body=AnyHost),),
        ),
        Operation(
            name="deleteHost",
            method="DELETE",
            path=HOST_PATH,
            handler=handlers.delete,
            summary="Delete a host",
            description="Refused while sandboxes live or rest there, since their only copy does; templates count not. "
            "With `force` they end with it: its agent is told to destroy them, and what it does not do in half a "
            "minute ends in `error`. Its credentials are dead. A machine that was away is to be purged by hand.",
            tag=TAG,
            query=DeleteHostQuery,
            successes=(Success(status=204, description="It is gone."),),
            errors=(errors.HostHasSandboxes, errors.Busy),
        ),
        Operation(
            name="previewHostDeletion",
            method="GET",
            path=f"{HOST_PATH}/delete-preview",
            handler=handlers.preview,
            summary="See what would end with a host",
            tag=TAG,
            successes=(Success(status=200, description="The host and its sandboxes.", body=HostDeletion),),
        ),
        Operation(
            name="createHostToken",
            method="POST",
            path=f"{HOST_PATH}/token",
            handler=handlers.new_token,
            summary="Make a fresh one-time token",
            description="For a host that never joined, or lost its credentials. It takes the place of the one before, "
            "so there is never more than one, however often this is sent; an Idempotency-Key changes nothing.",
            tag=TAG,
            successes=(Success(status=201, description="The token.", body=HostToken),),
            errors=(errors.TokensUnavailable,),
        ),
    ]


def _tags(handlers: FleetHandlers) -> list[Operation[Any, Any]]:
    path = f"{HOST_PATH}/tags"
    return [
        Operation(
            name="listHostTags",
            method="GET",
            path=path,
            handler=handlers.tags,
            summary="List the tags of a host",
            tag=TAG,
            successes=(Success(status=200, description="All of them.", body=HostTags),),
        ),
        Operation(
            name="addHostTag",
            method="POST",
            path=path,
            handler=handlers.add_tag,
            summary="Tag a host",
            description="Sandboxes that ask for tags go only to hosts that have them all. Nothing changes for one that "
            "it has already.",
            tag=TAG,
            body=HostTagBody,
            successes=(Success(status=201, description="Its tags now.", body=HostTags),),
            errors=(errors.QuotaExceeded,),
        ),
        Operation(
            name="removeHostTag",
            method="DELETE",
            path=f"{path}/{{tag}}",
            handler=handlers.remove_tag,
            summary="Take a tag from a host",
            description="Sandboxes that are there stay.",
            tag=TAG,
            successes=(Success(status=204, description="It is gone."),),
        ),
    ]


def _closing(handlers: FleetHandlers) -> list[Operation[Any, Any]]:
    return [
        Operation(
            name="cordonHost",
            method="POST",
            path=f"{HOST_PATH}/cordon",
            handler=handlers.cordon,
            summary="Give a host no new sandboxes",
            description="Those that are there stay as they are, and may be resumed.",
            tag=TAG,
            successes=(Success(status=204, description="It is closed."),),
        ),
        Operation(
            name="uncordonHost",
            method="POST",
            path=f"{HOST_PATH}/uncordon",
            handler=handlers.uncordon,
            summary="Open a host again",
            description="It drains no more. What was paused stays paused.",
            tag=TAG,
            successes=(Success(status=204, description="It is open."),),
            errors=(errors.Conflict,),
        ),
        Operation(
            name="drainHost",
            method="POST",
            path=f"{HOST_PATH}/drain",
            handler=handlers.drain,
            summary="Put all sandboxes of a host to rest",
            description="It takes no new ones, and those that run are paused, a few at a time; none can be resumed "
            "until the host is uncordoned, until when it is `draining`. The preview of its deletion lists them.",
            tag=TAG,
            successes=(Success(status=202, description="It drains.", body=AnyHost),),
            errors=(errors.Conflict,),
        ),
    ]


class FleetHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: FleetService) -> None:
        self._service = service

    async def create(self, call: Call[CreateHostBody, None]) -> TrioResponse:
        body = call.body
        wanted = WantedHost(
            type=body.type,
            team_id=None if body.team_id is UNSET else ids.parse_team_id(body.team_id),
            provider=None if body.provider is UNSET else body.provider,
            availability_zone=None if body.availability_zone is UNSET else body.availability_zone,
        )
        made = await self._service.create(call.user, wanted, call.request.idempotency_key())
        return json_response(CreatedHost.of(made), 201, {"Location": f"{PATH}/{ids.host_id(made.host.host.id)}"})

    async def list(self, call: Call[None, HostPageQuery]) -> TrioResponse:
        before = None if call.query.cursor is UNSET else cursors.parse_position(call.query.cursor)
        page = await self._service.list(call.user, call.query.limit, before)
        after = UNSET if page.after is None else cursors.encode_position(page.after)
        return json_response(Hosts(items=[AnyHost.seen(view) for view in page.items], next_cursor=after))

    async def get(self, call: Call[None, None]) -> TrioResponse:
        return json_response(AnyHost.seen(await self._service.get(call.user, _host(call))))

    async def delete(self, call: Call[None, DeleteHostQuery]) -> TrioResponse:
        await self._service.delete(call.user, _host(call), force=call.query.force)
        return no_content()

    async def preview(self, call: Call[None, None]) -> TrioResponse:
        return json_response(HostDeletion.of(*await self._service.preview(call.user, _host(call))))

    async def new_token(self, call: Call[None, None]) -> TrioResponse:
        return json_response(HostToken.of(await self._service.new_token(call.user, _host(call))), 201)

    async def tags(self, call: Call[None, None]) -> TrioResponse:
        return json_response(HostTags(items=[*await self._service.tags(call.user, _host(call))]))

    async def add_tag(self, call: Call[HostTagBody, None]) -> TrioResponse:
        tags = await self._service.add_tag(call.user, _host(call), call.body.tag)
        return json_response(HostTags(items=[*tags]), 201)

    async def remove_tag(self, call: Call[None, None]) -> TrioResponse:
        tag = call.path["tag"]
        if not _TAG.search(tag):
            raise errors.InvalidRequest("A tag is letters, digits and `._:=-`, at most 64 of them.", field="tag")
        await self._service.remove_tag(call.user, _host(call), tag)
        return no_content()

    async def cordon(self, call: Call[None, None]) -> TrioResponse:
        await self._service.cordon(call.user, _host(call))
        return no_content()

    async def uncordon(self, call: Call[None, None]) -> TrioResponse:
        await self._service.uncordon(call.user, _host(call))
        return no_content()

    async def drain(self, call: Call[None, None]) -> TrioResponse:
        return json_response(AnyHost.seen(await self._service.drain(call.user, _host(call))), 202)


def _host(call: Call[Any, Any]) -> UUID:
    return ids.parse_host_id(call.path["host_id"])
