"""A host begins: its row first, then the one-time token. A crash between the two leaves a host that never joined; a
fresh token, or its deletion, makes up for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from shlex import quote
from typing import TYPE_CHECKING, Protocol, cast
from uuid import UUID, uuid4

from capsule import errors
from capsule.auth.access import ACCESS, require
from capsule.db.queries import fleet, idempotency, memberships, teams
from capsule.fleet.acting import act_on, record, view
from capsule.fleet.views import FleetHost, Joining, MadeHost, WantedHost
from capsule.sandboxes.admission import fingerprint, same_request

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.queries.fleet import SeenHostRow
    from capsule.db.translated import TranslatedDatabase
    from capsule.principals import Role, User

ENDPOINT = "POST /v1/hosts"
MAX_HOSTS = 1000
"""Of a team's own; regular ones have no limit."""


class Tokens(Protocol):
    """Makes one-time tokens: capsule.hosts.registration."""

    async def new_token(self, host: UUID, *, created_by: UUID | None = None) -> str:
        """A fresh one; older ones of the host are void. NotFound for a host that is gone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Joiner:
    """Makes hosts known, and lets machines become them."""

    db: TranslatedDatabase
    tokens: Tokens
    settings: Settings

    async def create(self, user: User, wanted: WantedHost, key: str | None) -> MadeHost:
        """See `capsule.http.fleet_port.FleetService`."""
        host = await self.db.transaction(_create, user, wanted, key)
        return MadeHost(host=host, joining=await self._join(user, host.host.id))

    async def new_token(self, user: User, host: UUID) -> Joining:
        """See `capsule.http.fleet_port.FleetService`."""
        await self.db.transaction(_allow_token, user, host)
        return await self._join(user, host)

    async def _join(self, user: User, host: UUID) -> Joining:
        token = await self.tokens.new_token(host, created_by=user.id)
        return Joining(token=token, command=f"capsule-agent join --url {quote(self.settings.url)} --token {token}")


async def _create(tx: Connection, user: User, wanted: WantedHost, key: str | None) -> FleetHost:
    team_id = await _allowed_team(tx, user, wanted)
    # Whose it is belongs to the request: the same body sent from a session of another team asks for another host.
    host_id, asked = uuid4(), (ENDPOINT, replace(wanted, team_id=team_id))
    if key is not None:
        taken = await idempotency.claim(tx, user.id, key, fingerprint(asked), host_id, endpoint=ENDPOINT)
        if taken is not None:
            return _made_before(await fleet.find(tx, same_request(taken, asked), user.id), team_id)
    if team_id is not None and await fleet.count(tx, team_id) >= MAX_HOSTS:
        raise errors.QuotaExceeded(f"a team may have {MAX_HOSTS} hosts; delete one first", limit="max_hosts")
    await fleet.insert(
        tx,
        id=host_id,
        type=wanted.type,
        team_id=team_id,
        provider=wanted.provider,
        availability_zone=wanted.availability_zone,
    )
    host = await fleet.find(tx, host_id, user.id)
    assert host is not None  # noqa: S101 - we made it
    await record(tx, user, host, "create", status="success", metadata={"type": wanted.type})
    return view(host)


async def _allowed_team(tx: Connection, user: User, wanted: WantedHost) -> UUID | None:
    """Whose the host will be, locked. Forbidden, NotFound, NoTeam, InvalidRequest."""
    if wanted.type == "regular":
        if wanted.team_id is not None:
            raise errors.InvalidRequest("a regular host is no team's; leave team_id out", field="team_id")
        if not ACCESS["createHost"].instead & user.permissions:
            raise errors.Forbidden("regular hosts are for platform admins; `capsule admin` makes one")
        return None
    team_id = wanted.team_id or user.team_id
    if team_id is None:
        raise errors.NoTeam("your session has no live team; say whose the host is in team_id")
    team = await teams.lock(tx, team_id)
    role = None if team is None else await memberships.lock_role(tx, team_id, user.id)
    require("createHost", cast("Role | None", role))
    if team is None or not team.is_byoc:
        raise errors.Forbidden("this team does not bring its own hosts; a platform admin can allow it")
    return team_id


def _made_before(host: SeenHostRow | None, team_id: UUID | None) -> FleetHost:
    """The host that the key stands for, if it is `team_id`'s: whose rights were just looked at."""
    if host is None or host.team_id != team_id:
        raise errors.Conflict("the host that this request made was deleted; use a new Idempotency-Key")
    if host.credential_epoch:
        raise errors.Conflict(
            "the host that this request made has joined; POST /v1/hosts/{host_id}/token makes another token for it"
        )
    return view(host)


async def _allow_token(tx: Connection, user: User, host_id: UUID) -> None:
    acting = await act_on(tx, "createHostToken", user, host_id)
    await acting.record("token_create")
