"""What platform admins do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast
from uuid import UUID

from capsule import errors
from capsule.auth.access import ACCESS, admit
from capsule.db.queries import audit
from capsule.db.queries import platform as rows
from capsule.db.translated import TranslatedDatabase
from capsule.hosts.registration import view as host_view
from capsule.model import Page, Position
from capsule.people.views import AnyHostView, AnyTeamView, AnyUserView, TeamView

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.db.queries.platform import AnyHostRow, AnyTeamRow, AnyUserRow, Before
    from capsule.principals import Permission, User

R = TypeVar("R", "AnyTeamRow", "AnyUserRow", "AnyHostRow")
V = TypeVar("V")


class Platform:
    """See `capsule.http.people_ports.PlatformService`."""

    def __init__(self, db: Database) -> None:
        self._db = TranslatedDatabase(db)

    async def set_byoc(self, user: User, team: UUID, *, enabled: bool) -> None:
        """Whether the team brings its own hosts. NotFound for a team that is not or was deleted; Forbidden for who may
        not any more."""
        await self._db.transaction(partial(_set_byoc, user=user, team=team, enabled=enabled))

    async def teams(self, limit: int, before: Position | None) -> Page[AnyTeamView]:
        """All but the platform's own, newest first."""
        return await self._page(rows.teams, _team, limit, before)

    async def users(self, limit: int, before: Position | None) -> Page[AnyUserView]:
        """All, newest first."""
        return await self._page(rows.users, _user, limit, before)

    async def hosts(self, limit: int, before: Position | None) -> Page[AnyHostView]:
        """All that were not deleted, newest first."""
        return await self._page(rows.hosts, _host, limit, before)

    async def _page(
        self,
        fetch: Callable[[Connection, int, Before], Awaitable[list[R]]],
        view: Callable[[R], V],
        limit: int,
        before: Position | None,
    ) -> Page[V]:
        """One row more than asked for tells whether another page follows."""
        found = await self._db.run(fetch, limit + 1, None if before is None else (before.created_at, before.id))
        shown = found[:limit]
        after = Position(shown[-1].created_at, shown[-1].id) if len(found) > limit else None
        return Page(tuple(view(row) for row in shown), after)


async def _set_byoc(tx: Connection, *, user: User, team: UUID, enabled: bool) -> None:
    held = await rows.hold_permissions(tx, user.id)
    admit(ACCESS["setByoc"], replace(user, permissions=frozenset(cast("list[Permission]", held))))
    changed = await rows.set_byoc(tx, team, enabled=enabled)
    if changed is None:
        raise errors.NotFound("there is no such team")
    if changed:
        await audit.append(
            tx,
            actor_type="user",
            actor_id=user.id,
            actor_name=user.email,
            team_id=team,
            resource_type="team",
            resource_id=f"team-{team}",
            action="set_byoc",
            scope="admin",
            status="info",
            metadata={"enabled": "true" if enabled else "false"},
        )


def _team(row: AnyTeamRow) -> AnyTeamView:
    team = TeamView(id=row.id, name=row.name, slug=row.slug, is_byoc=row.is_byoc, created_at=row.created_at)
    return AnyTeamView(team=team, members=row.members, sandboxes=row.sandboxes, deleted_at=row.deleted_at)


def _user(row: AnyUserRow) -> AnyUserView:
    return AnyUserView(
        user_id=row.id,
        email=row.email,
        name=row.name,
        created_at=row.created_at,
        permissions=frozenset(cast("list[Permission]", row.permissions)),
    )


def _host(row: AnyHostRow) -> AnyHostView:
    return AnyHostView(host=host_view(row), team_name=row.team_name)
