"""Hosts as operators see and change them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from capsule import errors
from capsule.auth.access import ACCESS
from capsule.db.queries import fleet, sandboxes
from capsule.fleet.acting import act_on, look_at, view
from capsule.fleet.views import FleetHost, Joining, MadeHost, WantedHost
from capsule.model import Page, Position

if TYPE_CHECKING:
    from capsule.db.connection import Connection
    from capsule.db.queries.platform import AnyHostRow
    from capsule.fleet.joining import Joiner
    from capsule.fleet.removal import Remover
    from capsule.principals import User

MAX_TAGS = 64
"""Of one host."""


class Fleet:
    """See `capsule.http.fleet_port.FleetService`."""

    def __init__(self, joiner: Joiner, remover: Remover) -> None:
        self._db = joiner.db
        self._joiner = joiner
        self._remover = remover

    async def create(self, user: User, wanted: WantedHost, idempotency_key: str | None) -> MadeHost:
        """A `pending` host, and what makes a machine it. Sent again with its key while nothing has joined: the same
        host with a fresh token."""
        return await self._joiner.create(user, wanted, idempotency_key)

    async def new_token(self, user: User, host: UUID) -> Joining:
        """A fresh one-time token; older unused ones are void."""
        return await self._joiner.new_token(user, host)

    async def list(self, user: User, limit: int, before: Position | None) -> Page[FleetHost]:
        """Newest first: all of them for a platform admin, else those of the session's team."""
        everything = bool(ACCESS["listHosts"].instead & user.permissions)
        if not everything and user.team_id is None:
            raise errors.NoTeam("your session has no live team; switch to one that you are a member of")
        team = None if everything else user.team_id

        async def page(connection: Connection) -> list[AnyHostRow]:
            position = None if before is None else (before.created_at, before.id)
            return await fleet.page(connection, team, limit=limit + 1, before=position)

        rows = await self._db.run(page)
        shown = rows[:limit]
        after = Position(shown[-1].created_at, shown[-1].id) if len(rows) > limit else None
        return Page(tuple(view(row) for row in shown), after)

    async def get(self, user: User, host: UUID) -> FleetHost:
        """A host that was not deleted."""
        return view(await self._db.transaction(look_at, "getHost", user, host))

    async def delete(self, user: User, host: UUID, *, force: bool) -> None:
        """It is no host any more. HostHasSandboxes, unless forced: then they end with it."""
        await self._remover.delete(user, host, force=force)

    async def preview(self, user: User, host: UUID) -> tuple[FleetHost, Sequence[UUID]]:
        """The host, and the sandboxes that live or rest there."""

        async def read(tx: Connection) -> tuple[FleetHost, Sequence[UUID]]:
            found = await look_at(tx, "previewHostDeletion", user, host)
            return view(found), [row.id for row in await sandboxes.on_host(tx, host)]

        return await self._db.transaction(read)

    async def tags(self, user: User, host: UUID) -> Sequence[str]:
        """In alphabetical order."""
        return (await self._db.transaction(look_at, "listHostTags", user, host)).tags

    async def add_tag(self, user: User, host: UUID, tag: str) -> Sequence[str]:
        """The tags as they are then. QuotaExceeded."""
        return await self._db.transaction(_add_tag, user, host, tag)

    async def remove_tag(self, user: User, host: UUID, tag: str) -> None:
        """NotFound for a tag that it has not."""
        await self._db.transaction(_remove_tag, user, host, tag)

    async def cordon(self, user: User, host: UUID) -> None:
        """It takes no new sandboxes."""
        await self._db.transaction(_cordon, user, host)

    async def uncordon(self, user: User, host: UUID) -> None:
        """It takes new ones again, and drains no more. Conflict while it is being deleted."""
        await self._db.transaction(_uncordon, user, host)

    async def drain(self, user: User, host: UUID) -> FleetHost:
        """It takes no new ones, and whoever follows it puts what runs there to rest. Conflict for one that never
        registered."""
        return await self._db.transaction(_drain, user, host)


async def _add_tag(tx: Connection, user: User, host: UUID, tag: str) -> list[str]:
    acting = await act_on(tx, "addHostTag", user, host)
    if await fleet.add_tag(tx, host, tag):
        await acting.record("tag_add", metadata={"tag": tag})
    tags = await fleet.tags(tx, host)
    if len(tags) > MAX_TAGS:
        raise errors.QuotaExceeded(f"a host may have {MAX_TAGS} tags; remove one first", limit="max_tags")
    return tags


async def _remove_tag(tx: Connection, user: User, host: UUID, tag: str) -> None:
    acting = await act_on(tx, "removeHostTag", user, host)
    if not await fleet.remove_tag(tx, host, tag):
        raise errors.NotFound(f"this host has no tag {tag!r}")
    await acting.record("tag_remove", metadata={"tag": tag})


async def _cordon(tx: Connection, user: User, host: UUID) -> None:
    acting = await act_on(tx, "cordonHost", user, host)
    if await fleet.cordon(tx, host):
        await acting.record("cordon")


async def _uncordon(tx: Connection, user: User, host: UUID) -> None:
    acting = await act_on(tx, "uncordonHost", user, host)
    if await fleet.being_removed(tx, host):
        raise errors.Conflict("this host is being deleted; that cannot be undone")
    if await fleet.uncordon(tx, host):
        await acting.record("uncordon")


async def _drain(tx: Connection, user: User, host: UUID) -> FleetHost:
    acting = await act_on(tx, "drainHost", user, host)
    if acting.host.status == "pending":
        raise errors.Conflict("this host has not joined yet: there is nothing to drain; cordon it, or delete it")
    if await fleet.drain(tx, host):
        await acting.record("drain")
    return view(await look_at(tx, "drainHost", user, host))
