"""/v1/admin: what platform admins do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from capsule import errors
from capsule.http import cursors, fields, ids
from capsule.http.answers import Timestamp, given, optional_time, timestamp
from capsule.http.bodies import Cursor
from capsule.http.hosts import Host
from capsule.http.operations import Call, Operation, Success, json_response, no_content
from capsule.principals import Permission

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.fleet.views import FleetHost
    from capsule.http.people_ports import PlatformService
    from capsule.model import Page, Position
    from capsule.people.views import AnyHostView, AnyTeamView, AnyUserView

TAG = "admin"
PATH = "/v1/admin"


class ByocBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether a team brings its own hosts."""

    enabled: bool


class DirectoryQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which page of the list."""

    limit: fields.Limit = 50
    cursor: Cursor | UnsetType = UNSET


class AnyTeam(Struct, kw_only=True):
    """A team of whomever."""

    id: str
    name: str
    slug: str
    is_byoc: bool
    created_at: Timestamp
    members: int
    sandboxes: Annotated[int, Meta(description="Those that are not over.")]
    deleted_at: Timestamp | UnsetType = UNSET

    @classmethod
    def of(cls, view: AnyTeamView) -> AnyTeam:
        team = view.team
        return cls(
            id=ids.team_id(team.id),
            name=team.name,
            slug=team.slug,
            is_byoc=team.is_byoc,
            created_at=timestamp(team.created_at),
            members=view.members,
            sandboxes=view.sandboxes,
            deleted_at=optional_time(view.deleted_at),
        )


class AnyUser(Struct, kw_only=True):
    """An account of whomever."""

    user_id: str
    email: str
    name: str
    created_at: Timestamp
    permissions: Annotated[list[Permission], Meta(description="A platform admin's; empty for everybody else.")]

    @classmethod
    def of(cls, view: AnyUserView) -> AnyUser:
        return cls(
            user_id=ids.user_id(view.user_id),
            email=view.email,
            name=view.name,
            created_at=timestamp(view.created_at),
            permissions=sorted(view.permissions),
        )


class AnyHost(Host, kw_only=True):
    """A host of whomever."""

    team_name: Annotated[str, Meta(description="Of the team whose own host it is.")] | UnsetType = UNSET

    @classmethod
    def seen(cls, view: AnyHostView | FleetHost) -> AnyHost:
        """As those see it who may."""
        return cls(**msgspec.structs.asdict(Host.of(view.host)), team_name=given(view.team_name))


class AnyTeams(Struct, kw_only=True):
    """A page of teams."""

    items: list[AnyTeam]
    next_cursor: str | UnsetType = UNSET


class AnyUsers(Struct, kw_only=True):
    """A page of accounts."""

    items: list[AnyUser]
    next_cursor: str | UnsetType = UNSET


class AnyHosts(Struct, kw_only=True):
    """A page of hosts."""

    items: list[AnyHost]
    next_cursor: str | UnsetType = UNSET


def operations(service: PlatformService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = PlatformHandlers(service)
    return [
        Operation(
            name="setByoc",
            method="PUT",
            path=f"{PATH}/teams/{{team_id}}/byoc",
            handler=handlers.set_byoc,
            summary="Let a team bring its own hosts, or not",
            description="For platform admins. Hosts that it has already stay.",
            tag=TAG,
            body=ByocBody,
            successes=(Success(status=204, description="It is so."),),
            errors=(errors.NotFound,),
        ),
        _directory("listAllTeams", "teams", handlers.teams, AnyTeams, "Deleted ones too."),
        _directory("listAllUsers", "users", handlers.users, AnyUsers, ""),
        _directory("listAllHosts", "hosts", handlers.hosts, AnyHosts, ""),
    ]


def _directory(name: str, what: str, handler: Any, body: type[Struct], note: str) -> Operation[None, DirectoryQuery]:
    return Operation(
        name=name,
        method="GET",
        path=f"{PATH}/{what}",
        handler=handler,
        summary=f"List all {what}",
        description=f"For platform admins. Newest first. {note}".strip(),
        tag=TAG,
        query=DirectoryQuery,
        successes=(Success(status=200, description="A page.", body=body),),
    )


class PlatformHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: PlatformService) -> None:
        self._service = service

    async def set_byoc(self, call: Call[ByocBody, None]) -> TrioResponse:
        team = ids.parse_team_id(call.path["team_id"])
        await self._service.set_byoc(call.user, team, enabled=call.body.enabled)
        return no_content()

    async def teams(self, call: Call[None, DirectoryQuery]) -> TrioResponse:
        page = await self._service.teams(call.query.limit, _before(call.query))
        return json_response(AnyTeams(items=[AnyTeam.of(view) for view in page.items], next_cursor=_next(page)))

    async def users(self, call: Call[None, DirectoryQuery]) -> TrioResponse:
        page = await self._service.users(call.query.limit, _before(call.query))
        return json_response(AnyUsers(items=[AnyUser.of(view) for view in page.items], next_cursor=_next(page)))

    async def hosts(self, call: Call[None, DirectoryQuery]) -> TrioResponse:
        page = await self._service.hosts(call.query.limit, _before(call.query))
        return json_response(AnyHosts(items=[AnyHost.seen(view) for view in page.items], next_cursor=_next(page)))


def _before(query: DirectoryQuery) -> Position | None:
    return None if query.cursor is UNSET else cursors.parse_position(query.cursor)


def _next(page: Page[Any]) -> str | UnsetType:
    return UNSET if page.after is None else cursors.encode_position(page.after)
