"""/v1/admin: what platform admins do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capsule.http.operations import Operation
    from capsule.http.people_ports import PlatformService


def operations(_service: PlatformService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return []
