"""Hosts as operators see and change them: pages, tags, closing, draining, removal.

Whoever changes a host locks first its team's row, then the host's (`lock`), then sandboxes in the order of `on_host`.
So does who brings a sandbox there (`hosts.hold_open`): what a closed host was given comes before its closing.
"""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from capsule.db.connection import Connection
from capsule.db.queries.hosts import HostRow
from capsule.db.queries.platform import AnyHostRow
from capsule.db.queries.rows import columns, many, one


class SeenHostRow(AnyHostRow, frozen=True, kw_only=True):
    """A host that lives, as one user finds it. `role`: theirs in its team; `of_team`: it has one, which lives."""

    of_team: bool
    role: str | None


_COLUMNS = columns(HostRow, "h").replace(
    "h.tags", "array(select tag from host_tags where host_id = h.id order by tag) as tags"
)


async def find(tx: Connection, host_id: UUID, user_id: UUID) -> SeenHostRow | None:
    """A host that was not deleted, with what the user is to it."""
    record = await tx.fetchrow(
        f"""
        select {_COLUMNS}, t.name as team_name, t.id is not null and t.deleted_at is null as of_team, m.role
        from hosts h left join teams t on t.id = h.team_id
          left join memberships m on m.team_id = t.id and m.user_id = $2 and t.deleted_at is null
        where h.id = $1 and h.deleted_at is null
        """,
        host_id,
        user_id,
    )
    return one(SeenHostRow, record)


async def lock(tx: Connection, host_id: UUID) -> bool:
    """Whether the host lives; nobody changes it, or gives it a sandbox, until the transaction ends."""
    found = await tx.fetchval("select true from hosts where id = $1 and deleted_at is null for update", host_id)
    return found is not None


async def page(
    tx: Connection, team_id: UUID | None, *, limit: int, before: tuple[datetime, UUID] | None
) -> list[AnyHostRow]:
    """At most `limit` hosts that live, newest first; `team_id` None: all, else the team's own."""
    records = await tx.fetch(
        f"""
        select {_COLUMNS}, t.name as team_name
        from hosts h left join teams t on t.id = h.team_id
        where h.deleted_at is null and ($4::uuid is null or h.team_id = $4)
          and ($2::timestamptz is null or (h.created_at, h.id) < ($2::timestamptz, $3::uuid))
        order by h.created_at desc, h.id desc limit $1
        """,
        limit,
        *(before or (None, None)),
        team_id,
    )
    return many(AnyHostRow, records)


async def count(tx: Connection, team_id: UUID) -> int:
    """How many hosts of its own the team has."""
    found: int = await tx.fetchval("select count(*) from hosts where team_id = $1 and deleted_at is null", team_id)
    return found


async def insert(
    tx: Connection,
    *,
    id: UUID,  # noqa: A002 - the column's name
    type: str,  # noqa: A002 - the same
    team_id: UUID | None,
    provider: str | None,
    availability_zone: str | None,
) -> None:
    """A new `pending` host."""
    await tx.execute(
        "insert into hosts (id, type, team_id, provider, availability_zone) values ($1, $2, $3, $4, $5)",
        id,
        type,
        team_id,
        provider,
        availability_zone,
    )


async def add_tag(tx: Connection, host_id: UUID, tag: str) -> bool:
    """False when the host has it already."""
    status = await tx.execute(
        "insert into host_tags (host_id, tag) values ($1, $2) on conflict do nothing", host_id, tag
    )
    return status == "INSERT 0 1"


async def remove_tag(tx: Connection, host_id: UUID, tag: str) -> bool:
    """False when the host has it not."""
    return await tx.execute("delete from host_tags where host_id = $1 and tag = $2", host_id, tag) == "DELETE 1"


async def tags(tx: Connection, host_id: UUID) -> list[str]:
    """In the order of the alphabet."""
    records = await tx.fetch("select tag from host_tags where host_id = $1 order by tag", host_id)
    return [record["tag"] for record in records]


async def cordon(tx: Connection, host_id: UUID) -> bool:
    """It takes no new sandboxes; False when it took none before."""
    status = await tx.execute("update hosts set cordoned = true where id = $1 and not cordoned", host_id)
    return status == "UPDATE 1"


async def uncordon(tx: Connection, host_id: UUID) -> bool:
    """It takes new ones again and drains no more; False when nothing kept it from that."""
    status = await tx.execute(
        """
        update hosts set
          cordoned = false,
          generation = generation + (status = 'draining')::int,
          status = case
            when status <> 'draining' then status
            when proven_epoch = credential_epoch and credentials_revoked_at is null then 'online'
            else 'unreachable' end
        where id = $1 and (cordoned or status = 'draining')
        """,
        host_id,
    )
    return status == "UPDATE 1"


async def drain(tx: Connection, host_id: UUID) -> bool:
    """It takes no new ones, and whoever follows it puts what runs there to rest; False when it drains already, or never
    registered."""
    status = await tx.execute(
        """
        update hosts set cordoned = true, status = 'draining', generation = generation + 1
        where id = $1 and status in ('online', 'unreachable')
        """,
        host_id,
    )
    return status == "UPDATE 1"


async def being_removed(tx: Connection, host_id: UUID) -> bool:
    """Whether somebody has begun to delete it with its sandboxes."""
    return bool(await tx.fetchval("select exists (select from host_removals where host_id = $1)", host_id))


async def begin_removal(tx: Connection, host_id: UUID, due_at: datetime) -> bool:
    """The host is going: cordoned, and deleted by anybody after `due_at`. False when it was going already."""
    await cordon(tx, host_id)
    status = await tx.execute(
        "insert into host_removals (host_id, due_at) values ($1, $2) on conflict do nothing", host_id, due_at
    )
    return status == "INSERT 0 1"


async def removals_due(tx: Connection, now: datetime) -> Sequence[UUID]:
    """Hosts whose removal nobody has finished in time, the longest overdue first; at most 100."""
    records = await tx.fetch("select host_id from host_removals where due_at < $1 order by due_at limit 100", now)
    return [record["host_id"] for record in records]


async def stop_sandboxes(tx: Connection, host_id: UUID, *, actor_id: UUID | None, actor_name: str) -> None:
    """Everything on the host becomes `stopping`, due at once, with an audit row each. `actor_id` None: the system."""
    await tx.execute(
        """
        select from sandboxes where host_id = $1 and status not in ('stopping', 'stopped', 'error')
        order by created_at, id for no key update
        """,
        host_id,
    )
    await tx.execute(
        """
        with ended as (
          update sandboxes set
            status = 'stopping', generation = generation + 1, transition_deadline = clock_timestamp(),
            reason = 'its host is being deleted', last_updated = clock_timestamp()
          where host_id = $1 and status not in ('stopping', 'stopped', 'error')
          returning id, team_id, created_at)
        insert into audit_logs (team_id, actor_type, actor_id, actor_name, resource_type, resource_id, action, scope,
                                status, metadata)
        select team_id, case when $2::uuid is null then 'system' else 'user' end, $2::uuid, $3, 'sandbox', 'sb-' || id,
               'destroy', 'team', 'warning', '{"reason": "its host was deleted"}' from ended order by created_at, id
        """,
        host_id,
        actor_id,
        actor_name,
    )


async def finish_removal(tx: Connection, host_id: UUID) -> None:
    """What has not ended by now ends in `error`, and the host is gone. Nothing to do when it is, or is not going."""
    if not await lock(tx, host_id) or not await being_removed(tx, host_id):
        return
    await tx.execute(
        "select from sandboxes where host_id = $1 and status not in ('stopped', 'error') order by created_at, id"
        " for no key update",
        host_id,
    )
    await tx.execute(
        """
        update sandboxes set
          status = 'error', generation = generation + 1, transition_deadline = null, host_ip = null,
          reason = 'its host was deleted', last_updated = clock_timestamp()
        where host_id = $1 and status not in ('stopped', 'error')
        """,
        host_id,
    )
    await mark_deleted(tx, host_id)


async def mark_deleted(tx: Connection, host_id: UUID) -> None:
    """The host is gone, and with it all that it could show and all that was there.

    ConstraintViolated("sandboxes_live_host") while sandboxes live or rest there."""
    await tx.execute("update hosts set deleted_at = clock_timestamp() where id = $1", host_id)
    for table in ("host_refresh_tokens", "host_registration_tokens", "template_hosts", "host_removals"):
        await tx.execute(f"delete from {table} where host_id = $1", host_id)
