"""/v1/auth/oauth: signing in through an identity provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capsule.http.operations import Operation
    from capsule.http.people_ports import OAuthService


def operations(_service: OAuthService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return []
