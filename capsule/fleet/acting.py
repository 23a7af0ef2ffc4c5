"""Acting on a host that the request names: what every decision is read from, inside the transaction that acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from uuid import UUID

from capsule import errors
from capsule.auth.access import require_on_host
from capsule.db.queries import audit, fleet, memberships, teams
from capsule.fleet.views import FleetHost
from capsule.hosts.registration import view as host_view
from capsule.principals import Role, User

if TYPE_CHECKING:
    from capsule.db.connection import Connection
    from capsule.db.queries.audit import Outcome
    from capsule.db.queries.fleet import SeenHostRow
    from capsule.db.queries.platform import AnyHostRow

NO_HOST = "there is no such host, or it is not your team's; it may have been deleted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Acting:
    """Who acts on which host. `host` is locked, and so is the asker's membership, until the transaction ends."""

    tx: Connection
    user: User
    host: SeenHostRow

    async def record(self, action: str, *, status: Outcome = "info", metadata: Mapping[str, str] | None = None) -> None:
        """The audit row of what the user did to the host."""
        await record(self.tx, self.user, self.host, action, status=status, metadata=metadata)


async def act_on(tx: Connection, operation: str, user: User, host_id: UUID) -> Acting:
    """For changing a host. NotFound, Forbidden.

    Always first the team's row, then the host's: so a member's rights, and the host, stay as they were looked at.
    """
    host = _there(await fleet.find(tx, host_id, user.id))
    if host.team_id is not None and await teams.lock(tx, host.team_id) is not None:
        await memberships.lock_role(tx, host.team_id, user.id)
    await fleet.lock(tx, host_id)
    return Acting(tx=tx, user=user, host=await look_at(tx, operation, user, host_id))


async def look_at(tx: Connection, operation: str, user: User, host_id: UUID) -> SeenHostRow:
    """For reading. NotFound, Forbidden."""
    host = _there(await fleet.find(tx, host_id, user.id))
    role = cast("Role | None", host.role)
    try:
        require_on_host(operation, role, user.permissions, of_team=host.of_team)
    except errors.NotFound as err:
        raise errors.NotFound(NO_HOST) from err
    return host


async def record(
    tx: Connection,
    user: User,
    host: AnyHostRow | SeenHostRow,
    action: str,
    *,
    status: Outcome,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The audit row of what the user did to a host."""
    await audit.append(
        tx,
        actor_type="user",
        actor_id=user.id,
        actor_name=user.email,
        team_id=host.team_id,
        resource_type="host",
        resource_id=f"host-{host.id}",
        action=action,
        scope="admin",
        status=status,
        metadata=metadata,
    )


def view(row: AnyHostRow) -> FleetHost:
    """A row as those see it who may."""
    return FleetHost(host=host_view(row), team_name=row.team_name)


def _there(row: SeenHostRow | None) -> SeenHostRow:
    if row is None:
        raise errors.NotFound(NO_HOST)
    return row
