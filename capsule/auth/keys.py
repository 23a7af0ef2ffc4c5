"""API keys: how they look, and who holds one. Only the SHA-256 of a key is stored.

The database is asked on every request: a key that was revoked is dead at once, on every control plane.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from capsule import errors
from capsule.db.errors import DatabaseUnavailable
from capsule.db.queries import keys as rows
from capsule.principals import Principal

if TYPE_CHECKING:
    from uuid import UUID

    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.db.queries.keys import ApiKeyRow

PREFIX = "cap_"
ALIAS = "e2b_"
"""The same key as clients of E2B spell it."""

SHOWN_CHARACTERS = 12
"""What lists show of a key: enough to tell one's own keys apart, 128 bits short of using one."""

TOUCH_INTERVAL = timedelta(minutes=1)
"""How old last_used_at must be before it is written again (the statement checks it once more, by its own clock)."""

_HEX = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at the only moment when all of it is known."""

    text: str
    prefix: str
    sha256: bytes


def new_key() -> NewKey:
    """`cap_` and 40 hex digits: 160 bits."""
    return _key(secrets.token_hex(20))


def replayable_key(secret: bytes, salt: UUID, *, team: UUID, user: UUID, idempotency_key: str) -> NewKey:
    """The key that a request with an Idempotency-Key makes, and that the same request is answered with again although
    only its hash is stored: 160 bits of HMAC-SHA256 (RFC 2104) under `secret`, a key of this purpose alone.

    `salt` is random and stands in the row of the Idempotency-Key only, which is forgotten after 24 hours. Who reads the
    database without the control plane's secret key learns nothing; who has both can make anew the keys of the last
    day that were asked for with an Idempotency-Key, and no others, since what those were made from is gone. This
    leaks least: a key stored beside its hash, sealed or not, stands in every backup; one derived from its own id can be
    made anew for as long as it lives. `team` and `user` go in as well: one person's claim is no other's.
    """
    message = salt.bytes + team.bytes + user.bytes + idempotency_key.encode()  # only the last varies in length
    return _key(hmac.digest(secret, message, "sha256").hex()[:40])


def _key(digits: str) -> NewKey:
    text = PREFIX + digits
    return NewKey(text, text[:SHOWN_CHARACTERS], digest(text))


def canonical(text: str) -> str | None:
    """The key as we store it, whichever prefix it came with; None when it cannot be a key of ours."""
    prefix, rest = text[: len(PREFIX)], text[len(PREFIX) :]
    if prefix not in {PREFIX, ALIAS} or _HEX.fullmatch(rest) is None:
        return None
    return PREFIX + rest


def digest(text: str) -> bytes:
    """What is stored of a key in canonical form: SHA-256. Its 160 bits need no slow hash."""
    return hashlib.sha256(text.encode()).digest()


class ApiKeyAuthenticator:
    """Turns API keys into principals."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def api_key(self, key: str) -> Principal:
        """The holder of `key`. Unauthorized when it is malformed, unknown or revoked, the same words and the same work
        for each; NoTeam when its team was deleted; DatabaseUnavailable."""
        sha256 = digest(canonical(key) or key[:256])
        try:
            row = await self._db.run(_use, sha256)
        except DatabaseUnavailable as err:
            raise errors.DatabaseUnavailable("the database does not answer; try again", retry_after=1) from err
        if row is None:
            raise errors.Unauthorized("the API key is unknown or was revoked")
        if not row.team_alive:
            raise errors.NoTeam("the team of this API key was deleted")
        return Principal(team_id=row.team_id, actor_type="api_key", actor_id=row.id, actor_name=row.name)


async def _use(connection: Connection, sha256: bytes) -> ApiKeyRow | None:
    row = await rows.by_hash(connection, sha256)
    if row is None or not hmac.compare_digest(row.sha256, sha256):
        return None
    if row.team_alive and (row.last_used_at is None or datetime.now(UTC) - row.last_used_at > TOUCH_INTERVAL):
        await rows.touch_last_used(connection, row.id)
    return row
