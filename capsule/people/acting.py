"""Acting on a team that the request names: what every decision is read from, inside the transaction that acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from uuid import UUID

from capsule.auth.access import require
from capsule.db.queries import audit, memberships, teams
from capsule.principals import Role, User

if TYPE_CHECKING:
    from capsule.db.connection import Connection
    from capsule.db.queries.audit import Outcome, Scope
    from capsule.db.queries.teams import TeamOfUser, TeamRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Acting:
    """Who acts on which team. `team` is locked, and so is the asker's membership, until the transaction ends."""

    tx: Connection
    user: User
    team: TeamRow

    async def record(
        self,
        resource_type: str,
        resource_id: str,
        action: str,
        *,
        scope: Scope = "admin",
        status: Outcome,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """The audit row of what the user did."""
        await audit.append(
            self.tx,
            actor_type="user",
            actor_id=self.user.id,
            actor_name=self.user.email,
            team_id=self.team.id,
            resource_type=resource_type,
            resource_id=resource_id,
            action=action,
            scope=scope,
            status=status,
            metadata=metadata,
        )


async def act_on(tx: Connection, operation: str, user: User, team_id: UUID) -> Acting:
    """For changing a team or its members. NotFound, Forbidden.

    Always first the team's row, then memberships: everything that changes them takes the team's lock, so nothing
    changes between this look and the commit, and no two of them wait for each other.
    """
    team = await teams.lock(tx, team_id)
    role = None if team is None else await memberships.lock_role(tx, team_id, user.id)
    require(operation, cast("Role | None", role))
    assert team is not None  # noqa: S101 - there is a role
    return Acting(tx=tx, user=user, team=team)


async def look_at(tx: Connection, operation: str, user: User, team_id: UUID) -> TeamOfUser:
    """For reading. NotFound, Forbidden."""
    team = await teams.of_user(tx, user.id, team_id)
    require(operation, cast("Role | None", None if team is None else team.role))
    assert team is not None  # noqa: S101 - there is a role
    return team
