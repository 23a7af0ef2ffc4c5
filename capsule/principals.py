"""Who asks: the holder of an API key, or a person with a session. Read from the database for every request."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

ActorType = Literal["user", "api_key", "system"]
Role = Literal["member", "admin", "owner"]
GivenRole = Literal["member", "admin"]
"""What a member can be made; an owner is made with the team."""
Permission = Literal["hosts", "byoc", "directory", "templates"]
"""What a platform admin may be allowed: regular hosts; BYOC of a team; lists of teams, users, hosts; base templates."""

ROLES: tuple[Role, ...] = ("member", "admin", "owner")
"""From the least to the most."""
PERMISSIONS: tuple[Permission, ...] = ("hosts", "byoc", "directory", "templates")


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who acts for a team, for authorisation and for the audit trail. `actor_id` is the key's or user's id,
    `actor_name` the key's name or the user's address. A key acts as a member."""

    team_id: UUID
    actor_type: ActorType
    actor_id: UUID
    actor_name: str
    role: Role = "member"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A token in use. `id` is its jti, `issued_at` by the database's clock. `authenticated_at`: when the password was
    given, or a provider vouched; the same for all sessions that went on from that one. None: nobody knows."""

    id: UUID
    issued_at: datetime
    expires_at: datetime
    authenticated_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A person with a session. `team_id` and `role`: the team the session is for, None when it was deleted or the
    person is no member of it any more. `permissions` is empty for all but platform admins."""

    id: UUID
    email: str
    name: str
    session: Session
    team_id: UUID | None = None
    role: Role | None = None
    permissions: frozenset[Permission] = frozenset()

    def principal(self) -> Principal | None:
        """Acting for the session's team; None without one."""
        if self.team_id is None or self.role is None:
            return None
        return Principal(
            team_id=self.team_id, actor_type="user", actor_id=self.id, actor_name=self.email, role=self.role
        )


Asker = User | Principal
"""Who sent a request that needs a credential: a person, or (Principal) the holder of an API key."""
