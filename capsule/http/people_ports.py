"""What the HTTP layer needs from capsule.people, as `ports.py` says it of the rest. Every method may raise any class of
capsule.errors; anything else is a bug and answered 500.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from capsule.model import Page, Position
from capsule.people.views import (
    AccountView,
    AnyHostView,
    AnyTeamView,
    AnyUserView,
    ApiKeyView,
    AuditEntry,
    AuditFilter,
    Authenticated,
    FoundUser,
    MemberView,
    NewApiKey,
    Redirect,
    TeamView,
)
from capsule.principals import GivenRole, Principal, User


class AccountService(Protocol):
    """Accounts and sessions. `address` is the client's, for limits and for the audit trail."""

    async def sign_up(
        self, *, email: str, password: str, name: str, address: str, idempotency_key: str | None
    ) -> Authenticated:
        """An account with its own team. EmailTaken, InvalidRequest, RateLimited."""
        ...

    async def log_in(self, *, email: str, password: str, address: str) -> Authenticated:
        """Unauthorized, after the same time and in the same words whatever was wrong; RateLimited."""
        ...

    async def log_out(self, user: User) -> None:
        """End the session."""
        ...

    async def switch_team(self, user: User, team: UUID) -> Authenticated:
        """A session for another team of theirs. NotFound for one that is not or was deleted, Forbidden for one they are
        no member of."""
        ...

    async def me(self, user: User) -> AccountView:
        """Their account."""
        ...

    async def update_me(self, user: User, *, name: str | None) -> AccountView:
        """Change what is given."""
        ...

    async def change_password(self, user: User, *, current: str | None, new: str, address: str) -> None:
        """`current` may be None only for an account without a password. Ends all other sessions. Forbidden when
        `current` is wrong, RateLimited."""
        ...


class OAuthService(Protocol):
    """Signing in through an identity provider."""

    async def start(self, provider: str, *, address: str) -> Redirect:
        """To the provider. ProviderNotFound, RateLimited."""
        ...

    async def finish(
        self,
        provider: str,
        *,
        code: str | None,
        state: str | None,
        error: str | None,
        cookies: Mapping[str, str],
    ) -> Redirect:
        """Back to the dashboard, always: with a one-time code, or with an error. Never raises a CapsuleError."""
        ...

    async def exchange(self, *, code: str, cookies: Mapping[str, str], address: str) -> Authenticated:
        """Spend the one-time code, in the browser that got it. Unauthorized, RateLimited."""
        ...


class TeamService(Protocol):
    """Teams and their members. NotFound for a team the user is no member of, as for none; Forbidden for too low a
    role (`capsule.auth.access`)."""

    async def list(self, user: User, limit: int, before: Position | None) -> Page[TeamView]:
        """The user's teams that live, newest first."""
        ...

    async def create(self, user: User, *, name: str, idempotency_key: str | None) -> TeamView:
        """A team that the user owns. QuotaExceeded, RateLimited; Conflict when the one this key stands for is gone."""
        ...

    async def get(self, user: User, team: UUID) -> tuple[TeamView, Sequence[MemberView]]:
        """The team and its members, in the order they joined."""
        ...

    async def rename(self, user: User, team: UUID, name: str) -> None:
        """Another name; the slug stays."""
        ...

    async def delete(self, user: User, team: UUID) -> None:
        """The team is gone at once; its sandboxes and templates are being destroyed."""
        ...

    async def members(self, user: User, team: UUID, limit: int, after: Position | None) -> Page[MemberView]:
        """In the order they joined; `after` is (joined_at, user_id) of the last page's last."""
        ...

    async def add_member(self, user: User, team: UUID, *, email: str, idempotency_key: str | None) -> MemberView:
        """As `member`. NotFound for an unknown address, InvalidRequest for none, Conflict for a member,
        QuotaExceeded, RateLimited."""
        ...

    async def change_role(self, user: User, team: UUID, member: UUID, role: GivenRole) -> None:
        """Forbidden for the owner's; NotFound for somebody who is no member."""
        ...

    async def remove_member(self, user: User, team: UUID, member: UUID) -> None:
        """They lose everything at once, the keys they made too. Forbidden for the owner; NotFound."""
        ...

    async def leave(self, user: User, team: UUID) -> None:
        """As being removed. Forbidden for the owner."""
        ...

    async def search(self, user: User, email_prefix: str) -> Sequence[FoundUser]:
        """At most 10 people by the beginning of their address. Forbidden for who is admin or owner of no team;
        RateLimited."""
        ...


class ApiKeyService(Protocol):
    """API keys of the principal's team; members see and end their own, admins and owners all."""

    async def create(self, principal: Principal, *, name: str, idempotency_key: str | None) -> NewApiKey:
        """A key, shown once. QuotaExceeded."""
        ...

    async def list(self, principal: Principal, limit: int, before: Position | None) -> Page[ApiKeyView]:
        """Newest first."""
        ...

    async def revoke(self, principal: Principal, key: UUID) -> None:
        """It is dead at once. NotFound for a key that is not the team's, Forbidden for another member's."""
        ...


class AuditService(Protocol):
    """The audit trail of the principal's team."""

    async def list(
        self, principal: Principal, wanted: AuditFilter, limit: int, before: Position | None
    ) -> Page[AuditEntry]:
        """Newest first; members see scope `team` only."""
        ...


class PlatformService(Protocol):
    """What platform admins do; that the user is one was checked."""

    async def set_byoc(self, user: User, team: UUID, *, enabled: bool) -> None:
        """Whether the team brings its own hosts. NotFound for a team that is not or was deleted."""
        ...

    async def teams(self, limit: int, before: Position | None) -> Page[AnyTeamView]:
        """All but the platform's own, newest first."""
        ...

    async def users(self, limit: int, before: Position | None) -> Page[AnyUserView]:
        """All, newest first."""
        ...

    async def hosts(self, limit: int, before: Position | None) -> Page[AnyHostView]:
        """All that were not deleted, newest first."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PeopleServices:
    """All of them."""

    accounts: AccountService
    oauth: OAuthService
    teams: TeamService
    api_keys: ApiKeyService
    audit: AuditService
    platform: PlatformService
