"""/v1/teams, their members, and the search for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capsule.http.operations import Operation
    from capsule.http.people_ports import TeamService


def operations(_service: TeamService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return []
