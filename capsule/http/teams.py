"""/v1/teams: create, list, look at, rename, delete. Their members: capsule.http.members."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from capsule import errors
from capsule.http import cursors, ids, members
from capsule.http.operations import Call, Operation, Success, json_response, no_content
from capsule.http.sandboxes import LINK, page_response
from capsule.http.team_bodies import Team, TeamBody, TeamPageQuery, TeamWithMembers

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.people_ports import TeamService

TAG = "teams"
PATH = "/v1/teams"
TEAM_PATH = f"{PATH}/{{team_id}}"


def operations(service: TeamService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = TeamHandlers(service)
    return [
        Operation(
            name="listTeams",
            method="GET",
            path=PATH,
            handler=handlers.list,
            summary="List your teams",
            description="Newest first, each with your role in it.",
            tag=TAG,
            query=TeamPageQuery,
            successes=(Success(status=200, description="A page.", body=list[Team], headers=LINK),),
        ),
        Operation(
            name="createTeam",
            method="POST",
            path=PATH,
            handler=handlers.create,
            summary="Create a team",
            description="You own it.",
            tag=TAG,
            body=TeamBody,
            idempotent=True,
            successes=(Success(status=201, description="The team.", body=Team),),
            errors=(errors.QuotaExceeded, errors.Conflict, errors.IdempotencyKeyReused, errors.RateLimited),
        ),
        Operation(
            name="getTeam",
            method="GET",
            path=TEAM_PATH,
            handler=handlers.get,
            summary="Look at a team",
            description="With its members, in the order they joined.",
            tag=TAG,
            successes=(Success(status=200, description="The team.", body=TeamWithMembers),),
        ),
        Operation(
            name="renameTeam",
            method="PATCH",
            path=TEAM_PATH,
            handler=handlers.rename,
            summary="Rename a team",
            description="Its slug stays.",
            tag=TAG,
            body=TeamBody,
            successes=(Success(status=204, description="It is called so."),),
        ),
        Operation(
            name="deleteTeam",
            method="DELETE",
            path=TEAM_PATH,
            handler=handlers.delete,
            summary="Delete a team",
            description="It is gone at once, for all its members and keys. Its sandboxes and templates are being "
            "destroyed; where a host cannot be reached, as soon as it is back.",
            tag=TAG,
            successes=(Success(status=204, description="It is gone."),),
        ),
        *members.operations(service),
    ]


class TeamHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: TeamService) -> None:
        self._service = service

    async def list(self, call: Call[None, TeamPageQuery]) -> TrioResponse:
        query = call.query
        before = None if query.cursor is UNSET else cursors.parse_position(query.cursor)
        page = await self._service.list(call.user, query.limit, before)
        return page_response(
            [Team.of(view) for view in page.items], page, call.request.path, [("limit", str(query.limit))]
        )

    async def create(self, call: Call[TeamBody, None]) -> TrioResponse:
        key = call.request.idempotency_key()
        view = await self._service.create(call.user, name=call.body.name, idempotency_key=key)
        return json_response(Team.of(view), 201, {"Location": f"{PATH}/{ids.team_id(view.id)}"})

    async def get(self, call: Call[None, None]) -> TrioResponse:
        team, found = await self._service.get(call.user, ids.parse_team_id(call.path["team_id"]))
        return json_response(TeamWithMembers.of(team, found))

    async def rename(self, call: Call[TeamBody, None]) -> TrioResponse:
        await self._service.rename(call.user, ids.parse_team_id(call.path["team_id"]), call.body.name)
        return no_content()

    async def delete(self, call: Call[None, None]) -> TrioResponse:
        await self._service.delete(call.user, ids.parse_team_id(call.path["team_id"]))
        return no_content()
