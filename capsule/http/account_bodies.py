"""What is sent and answered under /v1/auth and /v1/me."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from capsule.http import ids
from capsule.http.answers import Timestamp, given, timestamp
from capsule.http.fields import NO_NUL, Name
from capsule.people.views import AccountView, Authenticated
from capsule.principals import PERMISSIONS, Permission, Role

Email = Annotated[str, Meta(min_length=3, max_length=320, pattern=NO_NUL, description="An e-mail address.")]
NewEmail = Annotated[Email, Meta(extra_json_schema={"format": "email"})]
Password = Annotated[
    str,
    Meta(
        min_length=8,
        max_length=1024,
        pattern=NO_NUL,
        description="8 characters at least, 1024 bytes in UTF-8 at most.",
    ),
]
GivenPassword = Annotated[str, Meta(max_length=1024, pattern=NO_NUL)]
"""One to be checked: whether it would do as a new one is nobody's business."""

TeamId = Annotated[str, Meta(pattern=ids.TEAM_FORM)]


class SignUpBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """An account to be made."""

    email: NewEmail
    password: Password
    name: Name


class LogInBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """Who, and the proof."""

    email: Email
    password: GivenPassword


class SwitchTeamBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """The team that the next session is for."""

    team_id: TeamId


class UpdateMeBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What is to change."""

    name: Name | UnsetType = UNSET


class ChangePasswordBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """The new password, and the old one where there is one."""

    current_password: (
        Annotated[GivenPassword, Meta(description="Left out by who signs in through a provider only.")] | UnsetType
    ) = UNSET
    new_password: Password


class Auth(Struct, kw_only=True):
    """A session that begins."""

    token: Annotated[str, Meta(description="Goes into `Authorization: Bearer …`; good for six hours.")]
    user_id: str
    team_id: Annotated[str, Meta(description="The session's team; empty for who is in none that lives.")]
    email: str
    name: str

    @classmethod
    def of(cls, session: Authenticated) -> Auth:
        return cls(
            token=session.token,
            user_id=ids.user_id(session.user_id),
            team_id="" if session.team_id is None else ids.team_id(session.team_id),
            email=session.email,
            name=session.name,
        )


class Me(Struct, kw_only=True):
    """Your account. `team_id` and `role`: of the session's team, while it lives and you are in it."""

    user_id: str
    email: str
    name: str
    has_password: Annotated[bool, Meta(description="False for who signs in through a provider only.")]
    created_at: Timestamp
    team_id: str | UnsetType = UNSET
    role: Role | UnsetType = UNSET
    permissions: Annotated[list[Permission], Meta(description="What a platform admin may do.")] | UnsetType = UNSET

    @classmethod
    def of(cls, view: AccountView) -> Me:
        return cls(
            user_id=ids.user_id(view.user_id),
            email=view.email,
            name=view.name,
            has_password=view.has_password,
            created_at=timestamp(view.created_at),
            team_id=UNSET if view.team_id is None else ids.team_id(view.team_id),
            role=given(view.role),
            permissions=[one for one in PERMISSIONS if one in view.permissions] or UNSET,
        )
