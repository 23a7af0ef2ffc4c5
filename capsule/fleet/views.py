"""What the use-cases about the fleet and the HTTP layer say to each other: plain frozen values, as in capsule.model."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from capsule.model import HostType, HostView


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetHost:
    """A host as those see it who may. `team_name`: of a BYOC host's team."""

    host: HostView
    team_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedHost:
    """A host to be made. `team_id` None: the session's team, for a BYOC host; a regular one has none."""

    type: HostType
    team_id: UUID | None = None
    provider: str | None = None
    availability_zone: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """What makes a machine this host, within an hour and once. `command` is all that an operator types there."""

    token: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeHost:
    """A host at the only moment when its token is known."""

    host: FleetHost
    joining: Joining
