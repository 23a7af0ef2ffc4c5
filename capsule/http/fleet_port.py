"""What the HTTP layer needs from the use-cases about hosts. Implemented by capsule.fleet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from capsule.fleet.views import FleetHost, Joining, MadeHost, WantedHost
from capsule.model import Page, Position
from capsule.principals import User


class FleetService(Protocol):
    """Hosts, as operators see them. NotFound for a host that the user may not see, as for none; Forbidden for one that
    they may see and no more."""

    async def create(self, user: User, wanted: WantedHost, idempotency_key: str | None) -> MadeHost:
        """A `pending` host, and what makes a machine it. Forbidden for a team without BYOC, QuotaExceeded."""
        ...

    async def list(self, user: User, limit: int, before: Position | None) -> Page[FleetHost]:
        """Newest first: all of them for a platform admin, else those of the session's team (NoTeam without)."""
        ...

    async def get(self, user: User, host: UUID) -> FleetHost:
        """A host that was not deleted."""
        ...

    async def delete(self, user: User, host: UUID, *, force: bool) -> None:
        """It is no host any more. HostHasSandboxes, unless forced: then they end with it."""
        ...

    async def preview(self, user: User, host: UUID) -> tuple[FleetHost, Sequence[UUID]]:
        """The host, and the sandboxes that live or rest there."""
        ...

    async def new_token(self, user: User, host: UUID) -> Joining:
        """A fresh one-time token; older unused ones are void."""
        ...

    async def tags(self, user: User, host: UUID) -> Sequence[str]:
        """In alphabetical order."""
        ...

    async def add_tag(self, user: User, host: UUID, tag: str) -> Sequence[str]:
        """The tags as they are then. QuotaExceeded."""
        ...

    async def remove_tag(self, user: User, host: UUID, tag: str) -> None:
        """NotFound for a tag that it has not."""
        ...

    async def cordon(self, user: User, host: UUID) -> None:
        """It takes no new sandboxes."""
        ...

    async def uncordon(self, user: User, host: UUID) -> None:
        """It takes new ones again, and drains no more. Conflict while it is being deleted."""
        ...

    async def drain(self, user: User, host: UUID) -> FleetHost:
        """It takes no new ones, and what runs there is put to rest. Conflict for one that never registered."""
        ...
