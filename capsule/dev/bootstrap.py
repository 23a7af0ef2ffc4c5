"""What `capsule dev` puts into a database before anybody can use it: an account, a team, a key, a host to be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from agent.wire.lifecycle import Status
from capsule.auth.keys import digest, new_key
from capsule.db.queries import hosts, keys, sandboxes, teams, templates, users

if TYPE_CHECKING:
    from uuid import UUID

    from capsule.db.connection import Connection

EnvironmentMaker = Callable[[], Awaitable[Mapping[str, str]]]

EMAIL = "dev@localhost"
KEY_NAME = "capsule dev"
PROVIDER = "capsule dev"
TEMPLATE = "minimal"


async def ensure_key(tx: Connection, stored: str | None) -> str:
    """The development team's API key: the stored one if it is good, else a new one."""
    known = None if stored is None else await keys.by_hash(tx, digest(stored))
    if stored is not None and known is not None and known.team_alive:
        return stored
    user = await users.by_email(tx, EMAIL)
    if user is None:
        user = await users.insert(tx, email=EMAIL, name="Developer")
    team = await teams.insert(tx, name="Developer's Team", owner_id=user.id)
    key = new_key()
    await keys.insert(tx, team_id=team.id, name=KEY_NAME, prefix=key.prefix, sha256=key.sha256, created_by=user.id)
    return key.text


async def may_serve(tx: Connection, host: UUID) -> bool:
    """Whether the host of the stored credentials is in this database, and they were not revoked."""
    row = await hosts.get(tx, host)
    return row is not None and row.credentials_revoked_at is None


async def own_host(tx: Connection, remembered: UUID | None) -> UUID | None:
    """Which host of this database an agent without credentials is: the one it remembers, else the one that `capsule
    dev` made. A second one beside it would never get its address."""
    if remembered is not None and await hosts.get(tx, remembered) is not None:
        return remembered
    made = [host for host in await hosts.list_all(tx) if host.provider == PROVIDER]
    made.sort(key=lambda host: (host.credential_epoch > 0, host.created_at))
    return made[-1].id if made else None


async def usable(tx: Connection, since: datetime) -> bool:
    """Whether a sandbox can be created: a host is online, was heard after `since`, and its base image is known."""
    online = await hosts.list_all(tx, statuses=["online"])
    heard = any(host.last_heartbeat is not None and host.last_heartbeat >= since for host in online)
    return heard and await templates.get_by_name(tx, teams.PLATFORM, TEMPLATE) is not None


async def end_sandboxes(tx: Connection, host: UUID) -> int:
    """Bring every row of the host to its end, after everything of it was removed; returns how many there were. Its
    snapshots are none any more."""
    rows = await sandboxes.on_host(tx, host)
    for row in rows:
        stopping = row
        if row.status != Status.STOPPING:
            changed = await sandboxes.change_status(
                tx,
                row.id,
                from_status=row.status,
                generation=row.generation,
                to_status=Status.STOPPING,
                transition_deadline=datetime.now(UTC),
            )
            if changed is None:
                continue
            stopping = changed
        await sandboxes.change_status(
            tx,
            row.id,
            from_status=stopping.status,
            generation=stopping.generation,
            to_status=Status.STOPPED,
            reason="the platform was stopped",
        )
    await templates.forget_host(tx, host)
    return len(rows)
