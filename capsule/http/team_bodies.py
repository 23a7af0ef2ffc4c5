"""What clients send to, and get from, the routes of teams and their members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from capsule.http import fields, ids
from capsule.http.answers import Timestamp, given, timestamp
from capsule.http.bodies import Cursor
from capsule.people.views import FoundUser as FoundView
from capsule.people.views import MemberView, TeamView
from capsule.principals import GivenRole, Role

TEAM_NAME = rf"^[A-Za-z0-9 _\-@']{{1,128}}{fields.END}"
MAX_EMAIL = 320

TeamName = Annotated[str, Meta(pattern=TEAM_NAME, description="Letters, digits, spaces and `_-@'`; at most 128.")]
Email = Annotated[
    str,
    Meta(
        min_length=3,
        max_length=MAX_EMAIL,
        pattern=fields.NO_NUL,
        description="The address of somebody who has an account.",
        extra_json_schema={"format": "email"},
    ),
]
EmailPrefix = Annotated[
    str,
    Meta(
        min_length=3,
        max_length=MAX_EMAIL,
        pattern="@",
        description="The beginning of an address, in whatever case: three characters or more, `@` among them.",
    ),
]


class TeamBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a team is called."""

    name: TeamName


class AddMemberBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """Who joins."""

    email: Email


class ChangeRoleBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a member may from now on."""

    role: GivenRole


class TeamPageQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which page of the teams, or of the members."""

    limit: fields.Limit = 50
    cursor: Cursor | UnsetType = UNSET


class SearchUsersQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Whom to look for."""

    email: EmailPrefix


class Team(Struct, kw_only=True):
    """A team. `slug`: as the team is called for ever, whatever its name."""

    id: str
    name: str
    slug: str
    is_byoc: Annotated[bool, Meta(description="Whether its sandboxes run on hosts of its own.")]
    created_at: Timestamp
    role: Annotated[Role, Meta(description="Yours in it.")] | UnsetType = UNSET

    @classmethod
    def of(cls, view: TeamView) -> Team:
        """As the API shows it."""
        return cls(
            id=ids.team_id(view.id),
            name=view.name,
            slug=view.slug,
            is_byoc=view.is_byoc,
            created_at=timestamp(view.created_at),
            role=given(view.role),
        )


class Member(Struct, kw_only=True):
    """A person in a team."""

    user_id: str
    name: str
    email: str
    role: Role
    joined_at: Timestamp

    @classmethod
    def of(cls, view: MemberView) -> Member:
        """As the API shows it."""
        return cls(
            user_id=ids.user_id(view.user_id),
            name=view.name,
            email=view.email,
            role=view.role,
            joined_at=timestamp(view.joined_at),
        )


class TeamWithMembers(Struct, kw_only=True):
    """A team and everybody in it, in the order they joined."""

    team: Team
    members: list[Member]

    @classmethod
    def of(cls, team: TeamView, members: Sequence[MemberView]) -> TeamWithMembers:
        """As the API shows it."""
        return cls(team=Team.of(team), members=[Member.of(member) for member in members])


class FoundUser(Struct, kw_only=True):
    """A person as others may find them."""

    user_id: str
    email: str
    name: str

    @classmethod
    def of(cls, view: FoundView) -> FoundUser:
        """As the API shows it."""
        return cls(user_id=ids.user_id(view.user_id), email=view.email, name=view.name)
