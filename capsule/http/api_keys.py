"""/v1/api-keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capsule.http.operations import Operation
    from capsule.http.people_ports import ApiKeyService


def operations(_service: ApiKeyService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return []
