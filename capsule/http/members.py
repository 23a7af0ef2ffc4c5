"""/v1/teams/{team_id}/members, leaving a team, and the search for people to add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from capsule import errors
from capsule.http import cursors, ids
from capsule.http.operations import Call, Operation, Success, json_response, no_content
from capsule.http.sandboxes import LINK, page_response
from capsule.http.team_bodies import AddMemberBody, ChangeRoleBody, FoundUser, Member, SearchUsersQuery, TeamPageQuery

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.people_ports import TeamService

TAG = "teams"
PATH = "/v1/teams/{team_id}/members"
MEMBER_PATH = f"{PATH}/{{user_id}}"


def operations(service: TeamService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = MemberHandlers(service)
    return [
        Operation(
            name="listMembers",
            method="GET",
            path=PATH,
            handler=handlers.list,
            summary="List members",
            description="In the order they joined.",
            tag=TAG,
            query=TeamPageQuery,
            successes=(Success(status=200, description="A page.", body=list[Member], headers=LINK),),
        ),
        Operation(
            name="addMember",
            method="POST",
            path=PATH,
            handler=handlers.add,
            summary="Add a member",
            description="Somebody who has an account, as `member`.",
            tag=TAG,
            body=AddMemberBody,
            idempotent=True,
            successes=(Success(status=201, description="They are a member.", body=Member),),
            errors=(errors.Conflict, errors.QuotaExceeded, errors.IdempotencyKeyReused, errors.RateLimited),
        ),
        Operation(
            name="changeRole",
            method="PATCH",
            path=MEMBER_PATH,
            handler=handlers.change_role,
            summary="Change a member's role",
            description="Not the owner's.",
            tag=TAG,
            body=ChangeRoleBody,
            successes=(Success(status=204, description="They have it."),),
        ),
        Operation(
            name="removeMember",
            method="DELETE",
            path=MEMBER_PATH,
            handler=handlers.remove,
            summary="Remove a member",
            description="With the next request they may nothing in the team; API keys that they made are dead. "
            "The owner cannot be removed.",
            tag=TAG,
            successes=(Success(status=204, description="They are no member."),),
        ),
        Operation(
            name="leaveTeam",
            method="POST",
            path="/v1/teams/{team_id}/leave",
            handler=handlers.leave,
            summary="Leave a team",
            description="API keys that you made for it are dead. The owner cannot leave.",
            tag=TAG,
            successes=(Success(status=204, description="You are no member."),),
        ),
        Operation(
            name="searchUsers",
            method="GET",
            path="/v1/users/search",
            handler=handlers.search,
            summary="Find people to add",
            description="At most 10, by the beginning of their address. For admins and owners of a team.",
            tag=TAG,
            query=SearchUsersQuery,
            successes=(Success(status=200, description="Who was found.", body=list[FoundUser]),),
            errors=(errors.RateLimited,),
        ),
    ]


class MemberHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: TeamService) -> None:
        self._service = service

    async def list(self, call: Call[None, TeamPageQuery]) -> TrioResponse:
        team, query = ids.parse_team_id(call.path["team_id"]), call.query
        after = None if query.cursor is UNSET else cursors.parse_position(query.cursor)
        page = await self._service.members(call.user, team, query.limit, after)
        return page_response(
            [Member.of(view) for view in page.items], page, call.request.path, [("limit", str(query.limit))]
        )

    async def add(self, call: Call[AddMemberBody, None]) -> TrioResponse:
        team, key = ids.parse_team_id(call.path["team_id"]), call.request.idempotency_key()
        view = await self._service.add_member(call.user, team, email=call.body.email, idempotency_key=key)
        return json_response(Member.of(view), 201)

    async def change_role(self, call: Call[ChangeRoleBody, None]) -> TrioResponse:
        team, member = ids.parse_team_id(call.path["team_id"]), ids.parse_user_id(call.path["user_id"])
        await self._service.change_role(call.user, team, member, call.body.role)
        return no_content()

    async def remove(self, call: Call[None, None]) -> TrioResponse:
        team, member = ids.parse_team_id(call.path["team_id"]), ids.parse_user_id(call.path["user_id"])
        await self._service.remove_member(call.user, team, member)
        return no_content()

    async def leave(self, call: Call[None, None]) -> TrioResponse:
        await self._service.leave(call.user, ids.parse_team_id(call.path["team_id"]))
        return no_content()

    async def search(self, call: Call[None, SearchUsersQuery]) -> TrioResponse:
        found = await self._service.search(call.user, call.query.email)
        return json_response([FoundUser.of(view) for view in found])
