"""One refresh token for the next: what is a renewal, what is an answer that was lost, and what is a theft."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from capsule.db.queries import audit, hosts
from capsule.db.queries import refresh_tokens as rows
from capsule.hosts.tokens import REFRESH_LIFETIME, digest

if TYPE_CHECKING:
    from capsule.db.connection import Connection
    from capsule.db.queries.hosts import HostRow
    from capsule.db.queries.refresh_tokens import RefreshTokenRow

log = structlog.get_logger()

REPEATED = "a refresh was answered again: its answer was lost, or somebody has a copy of this host's state"
REASON = "a refresh token was used twice: somebody has a copy of this host's credentials"


@dataclass(frozen=True, slots=True)
class Exchange:
    """`row`: of the following token. `again`: the same one as before, whose answer was lost."""

    row: RefreshTokenRow
    again: bool


async def exchange(tx: Connection, token: str, following: str) -> Exchange | None:
    """Spend `token` for `following`. None: refused, and `tx` must be committed all the same."""
    spent, next_one = digest(token), digest(following)
    expires_at = datetime.now(UTC) + REFRESH_LIFETIME
    # What ends the host's tokens ends those it can see: one that was just being made would outlive a theft.
    await rows.lock_host(tx, spent)
    row = await rows.rotate(tx, sha256=spent, new_sha256=next_one, expires_at=expires_at)
    if row is not None:
        return Exchange(row, again=False)
    answered = await _answered_before(tx, spent, next_one)
    if answered is None:
        return None
    host = await hosts.get(tx, answered.host_id)
    if host is not None:
        await _tell(tx, host, "credentials_repeated", "info", REPEATED)
    return Exchange(answered, again=True)


async def _answered_before(tx: Connection, spent: bytes, following: bytes) -> RefreshTokenRow | None:
    """The row that `spent` was exchanged for, if for the same key and still unused. Else it was stolen, by whoever
    shows it now or did before: the family ends, and with it the host's JWTs and its being online."""
    row = await rows.get(tx, spent)
    if row is None or row.superseded_at is None or row.revoked_at is not None:
        return None
    answer = await rows.get(tx, following)
    if answer is not None and answer.superseded_at is None and answer.revoked_at is None:
        return answer
    host = await hosts.revoke_credentials(tx, row.host_id) if await rows.revoke_family(tx, row.family) else None
    if host is None:
        return None
    await _tell(tx, host, "credentials_revoked", "error", REASON)
    log.error("host_credentials_revoked", host_id=str(host.id), reason=REASON)
    return None


async def _tell(tx: Connection, host: HostRow, action: str, status: audit.Outcome, reason: str) -> None:
    await audit.append(
        tx,
        actor_type="system",
        actor_id=None,
        actor_name="system",
        team_id=host.team_id,
        resource_type="host",
        resource_id=f"host-{host.id}",
        action=action,
        scope="admin",
        status=status,
        metadata={"reason": reason},
    )
