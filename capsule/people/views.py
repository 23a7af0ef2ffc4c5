"""What the use-cases about people and the HTTP layer say to each other: plain frozen values, as in capsule.model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from capsule.model import HostView
from capsule.principals import Permission, Role

Scope = Literal["team", "admin"]
Outcome = Literal["success", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Authenticated:
    """A session that begins. `team_id` None: a person without a live team."""

    token: str
    user_id: UUID
    team_id: UUID | None
    email: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cookie:
    """Of the paths that sign in, never for scripts. `seconds` 0 removes it; `strict`: not even a link from elsewhere
    brings it along."""

    name: str
    value: str
    seconds: int
    secure: bool
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where a browser is sent, and the cookies that go along."""

    location: str
    cookies: tuple[Cookie, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountView:
    """One's own account, in the session's team. `has_password` False: signs in through a provider only."""

    user_id: UUID
    email: str
    name: str
    has_password: bool
    created_at: datetime
    team_id: UUID | None = None
    role: Role | None = None
    permissions: frozenset[Permission] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamView:
    """A team that lives. `role`: the asker's in it, where there is an asker."""

    id: UUID
    name: str
    slug: str
    is_byoc: bool
    created_at: datetime
    role: Role | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """A person in a team."""

    user_id: UUID
    name: str
    email: str
    role: Role
    joined_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundUser:
    """A person as others may find them."""

    user_id: UUID
    email: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKeyView:
    """An API key without its secret. `created_by` None: its maker's account is gone, or it was made by the platform."""

    id: UUID
    name: str
    prefix: str
    created_at: datetime
    last_used: datetime | None = None
    created_by: FoundUser | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewApiKey:
    """A key at the only moment when all of it is known."""

    key: str
    view: ApiKeyView


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """A row of the audit trail."""

    id: UUID
    created_at: datetime
    actor_type: Literal["user", "api_key", "system"]
    actor_id: UUID | None
    actor_name: str
    resource_type: str
    resource_id: str
    action: str
    scope: Scope
    status: Outcome
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which rows: of one of these resource types, and with one of these actions; empty: of all."""

    resource_types: frozenset[str] = frozenset()
    actions: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyTeamView:
    """A team as a platform admin sees it, deleted or not."""

    team: TeamView
    members: int
    sandboxes: int
    deleted_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyUserView:
    """An account as a platform admin sees it."""

    user_id: UUID
    email: str
    name: str
    created_at: datetime
    permissions: frozenset[Permission]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminView:
    """A platform admin."""

    email: str
    name: str
    permissions: frozenset[Permission]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyHostView:
    """A host as a platform admin sees it. `team_name`: of a BYOC host's team."""

    host: HostView
    team_name: str | None = None
