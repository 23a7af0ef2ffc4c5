"""/v1/auth and /v1/me: accounts and sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capsule.http.operations import Operation
    from capsule.http.people_ports import AccountService


def operations(_service: AccountService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return []
