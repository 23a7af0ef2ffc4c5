"""Teams and their members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from uuid import UUID

import structlog

from capsule import errors
from capsule.config import Settings
from capsule.db.pool import Database
from capsule.db.queries import idempotency, memberships, teams
from capsule.db.translated import TranslatedDatabase
from capsule.model import Page, Position
from capsule.people import deletion, members
from capsule.people.acting import Acting, act_on, look_at
from capsule.people.registration import email_address, small_letters
from capsule.people.views import FoundUser, MemberView, TeamView
from capsule.principals import GivenRole, Role, User
from capsule.sandboxes.admission import fingerprint, same_request

if TYPE_CHECKING:
    from capsule.auth.rate_limits import RateLimits
    from capsule.db.connection import Connection
    from capsule.db.queries.memberships import FoundRow, MemberRow
    from capsule.db.queries.teams import TeamOfUser, TeamRow

log = structlog.get_logger()

ENDPOINT = "POST /v1/teams"
FOUND_AT_MOST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTeam:
    """A team to be made. `most`: how many its maker may own."""

    name: str
    idempotency_key: str | None
    most: int


class Teams:
    """See `capsule.http.people_ports.TeamService`."""

    def __init__(self, db: Database, settings: Settings, limits: RateLimits) -> None:
        self._db = TranslatedDatabase(db)
        self._settings = settings
        self._limits = limits

    async def list(self, user: User, limit: int, before: Position | None) -> Page[TeamView]:
        """The user's teams that live, newest first."""

        async def page(connection: Connection) -> list[TeamOfUser]:
            position = None if before is None else (before.created_at, before.id)
            return await teams.page_of_user(connection, user.id, limit=limit + 1, before=position)

        rows = await self._db.run(page)
        shown = rows[:limit]
        after = Position(shown[-1].created_at, shown[-1].id) if len(rows) > limit else None
        return Page(tuple(view(row) for row in shown), after)

    async def create(self, user: User, *, name: str, idempotency_key: str | None) -> TeamView:
        """A team that the user owns. QuotaExceeded, RateLimited."""
        await self._limits.hit("create_team", str(user.id))
        new = NewTeam(name=name, idempotency_key=idempotency_key, most=self._settings.max_teams_per_user)
        return await self._db.transaction(_create, user, new)

    async def get(self, user: User, team: UUID) -> tuple[TeamView, Sequence[MemberView]]:
        """The team and its members, in the order they joined."""

        async def read(tx: Connection) -> tuple[TeamOfUser, list[MemberRow]]:
            found = await look_at(tx, "getTeam", user, team)
            return found, await memberships.page(tx, team)

        found, rows = await self._db.transaction(read)
        return view(found), [members.view(row) for row in rows]

    async def rename(self, user: User, team: UUID, name: str) -> None:
        """Another name; the slug stays."""
        await self._db.transaction(_rename, user, team, name)

    async def delete(self, user: User, team: UUID) -> None:
        """The team is gone at once; its sandboxes and templates are being destroyed."""
        ended = await self._db.transaction(deletion.delete, user, team)
        log.info("team_deleted", deleted_team=str(team), sandboxes=ended)

    async def members(self, user: User, team: UUID, limit: int, after: Position | None) -> Page[MemberView]:
        """In the order they joined; `after` is (joined_at, user_id) of the last page's last."""

        async def read(tx: Connection) -> list[MemberRow]:
            await look_at(tx, "listMembers", user, team)
            position = None if after is None else (after.created_at, after.id)
            return await memberships.page(tx, team, limit=limit + 1, after=position)

        rows = await self._db.transaction(read)
        shown = rows[:limit]
        last = Position(shown[-1].joined_at, shown[-1].user_id) if len(rows) > limit else None
        return Page(tuple(members.view(row) for row in shown), last)

    async def add_member(self, user: User, team: UUID, *, email: str, idempotency_key: str | None) -> MemberView:
        """NotFound for an unknown address, Conflict for a member, QuotaExceeded, InvalidRequest for no address;
        RateLimited."""
        invitation = members.Invitation(team=team, email=email_address(email))
        await self._limits.hit("add_member", str(user.id))
        return await self._db.transaction(members.add, user, invitation, idempotency_key)

    async def change_role(self, user: User, team: UUID, member: UUID, role: GivenRole) -> None:
        """Forbidden for the owner's; NotFound for somebody who is no member."""
        await self._db.transaction(members.change_role, user, team, member, role)

    async def remove_member(self, user: User, team: UUID, member: UUID) -> None:
        """They lose everything at once, the keys they made too. Forbidden for the owner; NotFound."""
        await self._db.transaction(members.remove, user, team, member)

    async def leave(self, user: User, team: UUID) -> None:
        """As being removed. Forbidden for the owner."""
        await self._db.transaction(members.leave, user, team)

    async def search(self, user: User, email_prefix: str) -> Sequence[FoundUser]:
        """At most 10 people by the beginning of their address. Forbidden for who is admin or owner of no team;
        RateLimited."""
        await self._limits.hit("user_search", str(user.id))
        rows = await self._db.run(_search, user.id, email_prefix)
        return [FoundUser(user_id=row.user_id, email=row.email, name=row.name) for row in rows]


async def _create(tx: Connection, user: User, new: NewTeam) -> TeamView:
    owned = await teams.count_owned(tx, user.id)
    earlier = None if new.idempotency_key is None else await idempotency.get(tx, user.id, new.idempotency_key)
    if earlier is not None:
        made = await teams.of_user(tx, user.id, same_request(earlier, _wanted(new)))
        if made is None:
            raise errors.Conflict("the team that was made with this Idempotency-Key is gone; use a new key")
        return view(made)
    if owned >= new.most:
        raise errors.QuotaExceeded(
            f"you own {owned} teams, which is the most that a user may; delete one first", limit="max_teams_per_user"
        )
    team = await teams.insert(tx, name=new.name, owner_id=user.id)
    if new.idempotency_key is not None:
        wanted = fingerprint(_wanted(new))
        taken = await idempotency.claim(tx, user.id, new.idempotency_key, wanted, team.id, endpoint=ENDPOINT)
        if taken is not None:
            raise errors.IdempotencyKeyReused("this Idempotency-Key is being used for a different request")
    await Acting(tx=tx, user=user, team=team).record("team", f"team-{team.id}", "create", status="success")
    return view(team, "owner")


def _wanted(new: NewTeam) -> tuple[str, str]:
    return ENDPOINT, new.name


async def _rename(tx: Connection, user: User, team_id: UUID, name: str) -> None:
    acting = await act_on(tx, "renameTeam", user, team_id)
    old = acting.team.name
    if old == name:
        return
    await teams.rename(tx, team_id, name)
    metadata = {"old_name": old, "new_name": name}
    await acting.record("team", f"team-{team_id}", "rename", scope="team", status="info", metadata=metadata)


async def _search(connection: Connection, user_id: UUID, prefix: str) -> list[FoundRow]:
    if not await memberships.administers(connection, user_id):
        raise errors.Forbidden("this is for admins and owners of a team")
    small = small_letters(prefix)
    return [] if small is None else await memberships.search(connection, small, FOUND_AT_MOST)


def view(row: TeamOfUser | TeamRow, role: Role | None = None) -> TeamView:
    """A row as its members see it. `role`: where the row does not say it."""
    known = row.role if isinstance(row, teams.TeamOfUser) else role
    return TeamView(
        id=row.id,
        name=row.name,
        slug=row.slug,
        is_byoc=row.is_byoc,
        created_at=row.created_at,
        role=cast("Role | None", known),
    )
