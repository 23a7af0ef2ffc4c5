"""API keys of a team: made, listed and ended by people."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from uuid import UUID, uuid4

import msgspec

from capsule import errors
from capsule.auth.access import reaches_all
from capsule.auth.keys import NewKey, new_key, replayable_key
from capsule.db.queries import audit, idempotency, keys
from capsule.db.translated import TranslatedDatabase
from capsule.model import Page, Position
from capsule.people.views import ApiKeyView, FoundUser, NewApiKey

if TYPE_CHECKING:
    from collections.abc import Mapping

    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.db.queries.keys import ListedKeyRow
    from capsule.principals import Principal, Role

ENDPOINT = "POST /v1/api-keys"
KEY_PURPOSE = "api-key-replay"
MAKER_GONE = "you are no longer a member of this team; switch to one that you are a member of"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What a request asks for."""

    principal: Principal
    name: str
    idempotency_key: str | None

    def fingerprint(self) -> bytes:
        """The same for the same request; another person's is another, even within the team."""
        asked = (ENDPOINT, self.principal.actor_id, self.name)
        return hashlib.sha256(msgspec.json.encode(asked)).digest()


class ApiKeys:
    """See `capsule.http.people_ports.ApiKeyService`."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = TranslatedDatabase(db)
        self._secret = settings.derive_key(KEY_PURPOSE)

    async def create(self, principal: Principal, *, name: str, idempotency_key: str | None) -> NewApiKey:
        """A key, shown once. QuotaExceeded, IdempotencyKeyReused; Conflict when the key that the same request made
        before was revoked since; NoTeam."""
        wanted = _Wanted(principal=principal, name=name, idempotency_key=idempotency_key)
        return await self._db.transaction(_create, self._secret, wanted)

    async def list(self, principal: Principal, limit: int, before: Position | None) -> Page[ApiKeyView]:
        """Newest first: one's own, or all where the role reaches so far."""
        rows = await self._db.run(_page, principal, limit, before)
        views = tuple(_view(row) for row in rows[:limit])
        after = Position(views[-1].created_at, views[-1].id) if len(rows) > limit else None
        return Page(views, after)

    async def revoke(self, principal: Principal, key: UUID) -> None:
        """It is dead at once. NotFound for a key that is not the team's, Forbidden for another member's."""
        await self._db.transaction(_revoke, principal, key)


async def _create(tx: Connection, secret: bytes, wanted: _Wanted) -> NewApiKey:
    principal = wanted.principal
    limit = await keys.lock_team(tx, principal.team_id)
    if limit is None or await keys.lock_maker(tx, principal.team_id, principal.actor_id) is None:
        raise errors.NoTeam(MAKER_GONE)
    made = new_key()
    if wanted.idempotency_key is not None:
        salt = uuid4()
        taken = await idempotency.claim(
            tx, principal.team_id, wanted.idempotency_key, wanted.fingerprint(), salt, endpoint=ENDPOINT
        )
        if taken is not None and taken.request_sha256 != wanted.fingerprint():
            raise errors.IdempotencyKeyReused("this Idempotency-Key was used for a different request; use a new one")
        made = replayable_key(
            secret,
            salt if taken is None else taken.resource_id,
            team=principal.team_id,
            user=principal.actor_id,
            idempotency_key=wanted.idempotency_key,
        )
        if taken is not None:
            return await _made_before(tx, made)
    if await keys.count(tx, principal.team_id) >= limit:
        raise errors.QuotaExceeded(
            f"max_api_keys of your team is {limit}; revoke one that is not used any more", limit="max_api_keys"
        )
    return await _insert(tx, wanted, made)


async def _insert(tx: Connection, wanted: _Wanted, made: NewKey) -> NewApiKey:
    principal = wanted.principal
    row = await keys.insert(
        tx,
        team_id=principal.team_id,
        name=wanted.name,
        prefix=made.prefix,
        sha256=made.sha256,
        created_by=principal.actor_id,
    )
    await _record(tx, principal, row.id, "create", "success", {"name": row.name})
    return NewApiKey(key=made.text, view=_view(_there(await keys.listed(tx, row.id))))


async def _made_before(tx: Connection, made: NewKey) -> NewApiKey:
    row = await keys.by_hash(tx, made.sha256)
    if row is None:
        raise errors.Conflict("the key that this request made was revoked since; use a new Idempotency-Key")
    return NewApiKey(key=made.text, view=_view(_there(await keys.listed(tx, row.id))))


async def _page(
    connection: Connection, principal: Principal, limit: int, before: Position | None
) -> list[ListedKeyRow]:
    return await keys.page(
        connection,
        principal.team_id,
        limit=limit + 1,
        created_by=None if reaches_all("listApiKeys", principal.role) else principal.actor_id,
        before=None if before is None else (before.created_at, before.id),
    )


async def _revoke(tx: Connection, principal: Principal, key: UUID) -> None:
    # The person first, then the key: in this order they are locked where a member is removed.
    role = await keys.lock_maker(tx, principal.team_id, principal.actor_id)
    if role is None:
        raise errors.NoTeam(MAKER_GONE)
    row = await keys.lock(tx, principal.team_id, key)
    if row is None:
        raise errors.NotFound("your team has no such API key, or it was revoked")
    if row.created_by != principal.actor_id and not reaches_all("revokeApiKey", cast("Role", role)):
        raise errors.Forbidden("this API key is another member's; ask them, or an admin of the team, to revoke it")
    await keys.revoke(tx, principal.team_id, key)
    await _record(tx, principal, key, "revoke", "warning", {"name": row.name})


async def _record(
    tx: Connection,
    principal: Principal,
    key: UUID,
    action: str,
    status: audit.Outcome,
    metadata: Mapping[str, str],
) -> None:
    await audit.append(
        tx,
        actor_type=principal.actor_type,
        actor_id=principal.actor_id,
        actor_name=principal.actor_name,
        team_id=principal.team_id,
        resource_type="api_key",
        resource_id=f"key-{key}",
        action=action,
        status=status,
        metadata=metadata,
    )


def _there(row: ListedKeyRow | None) -> ListedKeyRow:
    if row is None:
        raise errors.Conflict("the key was revoked meanwhile")
    return row


def _view(row: ListedKeyRow) -> ApiKeyView:
    creator = None
    if row.created_by is not None:
        creator = FoundUser(user_id=row.created_by, email=row.creator_email or "", name=row.creator_name or "")
    return ApiKeyView(
        id=row.id,
        name=row.name,
        prefix=row.prefix,
        created_at=row.created_at,
        last_used=row.last_used_at,
        created_by=creator,
    )
