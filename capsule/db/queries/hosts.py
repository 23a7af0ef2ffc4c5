"""Hosts: enrolment, heartbeats, status."""

# ruff: noqa: S608 - only column lists of this module are put into statements

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from uuid import UUID

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import columns, many, one, only


class HostRow(msgspec.Struct, frozen=True, kw_only=True):
    """A host; it lives while `deleted_at` is None. What its agent reported is None until it registered.

    `generation` grows with each change of status, `credential_epoch` with each registration, and when its credentials
    end. Its address is proven while `proven_epoch` is `credential_epoch`.
    """

    id: UUID
    type: str
    team_id: UUID | None
    provider: str | None
    availability_zone: str | None
    status: str
    cordoned: bool
    address: str | None
    cert_fingerprint: str | None
    arch: str | None
    cpu_cores: int | None
    memory_mb: int | None
    disk_gb: int | None
    last_heartbeat: datetime | None
    generation: int
    credential_epoch: int
    proven_epoch: int
    credentials_revoked_at: datetime | None
    earlier_cert_fingerprint: str | None
    repeated_cert_fingerprints: list[str]
    created_at: datetime
    deleted_at: datetime | None
    tags: list[str]

    @property
    def proven(self) -> bool:
        """Whether its agent was reached at its address since it registered, and nobody stole its credentials."""
        return 0 < self.proven_epoch == self.credential_epoch and self.credentials_revoked_at is None


_TAGS = "array(select tag from host_tags t where t.host_id = h.id order by tag) as tags"
_COLUMNS = columns(HostRow, "h").replace("h.tags", _TAGS)


async def insert(
    tx: Connection,
    *,
    type: str,  # noqa: A002 - the column's name
    team_id: UUID | None = None,
    provider: str | None = None,
    availability_zone: str | None = None,
) -> HostRow:
    """A new `pending` host of type `regular`, or `byoc` with its team."""
    record = await tx.fetchrow(
        f"""
        insert into hosts as h (type, team_id, provider, availability_zone) values ($1, $2, $3, $4)
        returning {_COLUMNS}
        """,
        type,
        team_id,
        provider,
        availability_zone,
    )
    return only(HostRow, record)


async def get(tx: Connection, host_id: UUID) -> HostRow | None:
    """A host that lives."""
    return one(
        HostRow, await tx.fetchrow(f"select {_COLUMNS} from hosts h where h.id = $1 and h.deleted_at is null", host_id)
    )


async def hold(tx: Connection, host_id: UUID) -> HostRow | None:
    """A host that lives, unchanged until the transaction ends: its heartbeats wait."""
    record = await tx.fetchrow(
        f"select {_COLUMNS} from hosts h where h.id = $1 and h.deleted_at is null for share of h", host_id
    )
    return one(HostRow, record)


async def hold_open(tx: Connection, host_id: UUID, *, resident: bool = False) -> bool:
    """Whether the host is online and takes new sandboxes; `resident`: one that rests there may wake. Whoever closes or
    deletes it (`fleet.lock`) waits until the transaction ends; its heartbeats do not."""
    found = await tx.fetchval(
        """
        select true from hosts
        where id = $1 and deleted_at is null and status = 'online' and ($2 or not cordoned) for key share
        """,
        host_id,
        resident,
    )
    return found is not None


async def list_all(
    tx: Connection, *, team_id: UUID | None = None, statuses: Collection[str] | None = None
) -> list[HostRow]:
    """Hosts that live, oldest first; only the team's own, and only those in `statuses`, when given."""
    records = await tx.fetch(
        f"""
        select {_COLUMNS} from hosts h
        where h.deleted_at is null and ($1::uuid is null or h.team_id = $1)
          and ($2::text[] is null or h.status = any($2))
        order by h.created_at, h.id
        """,
        team_id,
        None if statuses is None else list(statuses),
    )
    return many(HostRow, records)


async def insert_registration_token(
    tx: Connection, *, host_id: UUID, sha256: bytes, expires_at: datetime, created_by: UUID | None = None
) -> UUID:
    """A one-time token for the host; older unused ones of it are void from now on. Of two that are made at once the
    later one voids the other: that one it would not see without the lock."""
    await tx.execute("select from hosts where id = $1 for no key update", host_id)
    await tx.execute("delete from host_registration_tokens where host_id = $1 and used_at is null", host_id)
    token_id: UUID = await tx.fetchval(
        """
        insert into host_registration_tokens (host_id, sha256, expires_at, created_by) values ($1, $2, $3, $4)
        returning id
        """,
        host_id,
        sha256,
        expires_at,
        created_by,
    )
    return token_id


async def take_registration_token(tx: Connection, sha256: bytes) -> UUID | None:
    """Spend the token: the id of its host, or None when it is unknown, spent or expired, or the host is gone.

    Of two that try at once one gets it. If the transaction rolls back, the token is unspent. Its host is locked first,
    as by who makes the next one.
    """
    await tx.execute(
        """
        select from hosts where id = (select host_id from host_registration_tokens where sha256 = $1)
        for no key update
        """,
        sha256,
    )
    host_id: UUID | None = await tx.fetchval(
        """
        update host_registration_tokens r set used_at = now() from hosts h
        where r.sha256 = $1 and r.used_at is null and r.expires_at > now()
          and h.id = r.host_id and h.deleted_at is null
        returning r.host_id
        """,
        sha256,
    )
    return host_id


async def note_spent_token(tx: Connection, host_id: UUID, sha256: bytes, *, expires_at: datetime) -> bool:
    """Write down that a token kept elsewhere is spent; False when it was before, or the host is gone."""
    token_id = await tx.fetchval(
        """
        insert into host_registration_tokens (host_id, sha256, expires_at, used_at)
        select h.id, $2, $3, now() from hosts h where h.id = $1 and h.deleted_at is null
        on conflict (sha256) do nothing
        returning id
        """,
        host_id,
        sha256,
        expires_at,
    )
    return token_id is not None


async def register(
    tx: Connection,
    host_id: UUID,
    *,
    address: str,
    cert_fingerprint: str,
    arch: str,
    cpu_cores: int,
    memory_mb: int,
    disk_gb: int,
) -> HostRow | None:
    """The host claims an address, with the certificate pinned; None when it is gone. Its earlier tokens are dead.

    `prove` makes it online. Until then it is what it was: `pending`, `draining`, else `unreachable`.
    ConstraintViolated("hosts_cert_fingerprint_key") when another living host has the certificate.
    """
    record = await tx.fetchrow(
        f"""
        update hosts as h set
          address = $2, cert_fingerprint = $3, earlier_cert_fingerprint = null,
          repeated_cert_fingerprints = '{{}}',
          arch = $4, cpu_cores = $5, memory_mb = $6, disk_gb = $7,
          status = case status when 'online' then 'unreachable' else status end,
          generation = generation + (status = 'online')::int,
          credential_epoch = credential_epoch + 1, credentials_revoked_at = null, last_heartbeat = now()
        where h.id = $1 and h.deleted_at is null
        returning {_COLUMNS}
        """,
        host_id,
        address,
        cert_fingerprint,
        arch,
        cpu_cores,
        memory_mb,
        disk_gb,
    )
    # With the host locked: a refresh that was under way is over, and what it made is seen.
    await tx.execute(
        "update host_refresh_tokens set revoked_at = now() where host_id = $1 and revoked_at is null", host_id
    )
    return one(HostRow, record)


async def holds_address(tx: Connection, address: str, *, other_than: UUID) -> bool:
    """Whether another living host is proven to be at `address`."""
    held: bool = await tx.fetchval(
        """
        select exists (select from hosts where lower(address) = lower($1) and id <> $2
                         and deleted_at is null and proven_epoch = credential_epoch)
        """,
        address,
        other_than,
    )
    return held


async def prove(
    tx: Connection, host_id: UUID, *, from_status: str, generation: int, epoch: int, address: str, cert_fingerprint: str
) -> HostRow | None:
    """Compare-and-set: the agent with that certificate was reached at that address; a `pending` or `unreachable` host
    is online from now on. None when it is not what it was any more, or is proven, or its credentials were revoked.

    ConstraintViolated("hosts_address_key") when another living host was proven to be there.
    """
    record = await tx.fetchrow(
        f"""
        update hosts as h set
          proven_epoch = credential_epoch,
          status = case when status in ('pending', 'unreachable') then 'online' else status end,
          generation = generation + (status in ('pending', 'unreachable'))::int
        where h.id = $1 and h.status = $2 and h.generation = $3 and h.credential_epoch = $4 and h.address = $5
          and h.cert_fingerprint = $6 and h.proven_epoch < h.credential_epoch and h.credentials_revoked_at is null
          and h.deleted_at is null
        returning {_COLUMNS}
        """,
        host_id,
        from_status,
        generation,
        epoch,
        address,
        cert_fingerprint,
    )
    return one(HostRow, record)


async def revoke_credentials(tx: Connection, host_id: UUID) -> HostRow | None:
    """End the host's JWTs (the epoch grows) and its being online, until it registers anew. None when it is gone."""
    record = await tx.fetchrow(
        f"""
        update hosts as h set
          credential_epoch = credential_epoch + 1, credentials_revoked_at = now(),
          status = case status when 'online' then 'unreachable' else status end,
          generation = generation + (status = 'online')::int
        where h.id = $1 and h.deleted_at is null
        returning {_COLUMNS}
        """,
        host_id,
    )
    return one(HostRow, record)


async def pin_certificate(tx: Connection, host_id: UUID, cert_fingerprint: str, *, again: bool = False) -> bool:
    """A renewed certificate takes the place of the one before, which stays pinned beside it; False when the host is
    gone. `again`: of the same renewal. The agent has what it had before, or any of the answers: all stay pinned (of the
    answers the last nine)."""
    tag = await tx.execute(
        """
        update hosts set
          cert_fingerprint = $2,
          earlier_cert_fingerprint = case when $3 then earlier_cert_fingerprint else cert_fingerprint end,
          repeated_cert_fingerprints =
            case when $3 then (array_prepend(cert_fingerprint, repeated_cert_fingerprints))[1:8] else '{}' end
        where id = $1 and deleted_at is null
        """,
        host_id,
        cert_fingerprint,
        again,
    )
    return tag == "UPDATE 1"


async def heartbeat(tx: Connection, host_id: UUID) -> HostRow | None:
    """The host was heard now; None when it is gone. Its status is the monitor's to change."""
    record = await tx.fetchrow(
        f"""
        update hosts as h set last_heartbeat = now() where h.id = $1 and h.deleted_at is null returning {_COLUMNS}
        """,
        host_id,
    )
    return one(HostRow, record)


async def mark_status(
    tx: Connection, host_id: UUID, *, from_status: str, generation: int, to_status: str
) -> HostRow | None:
    """Compare-and-set: the row as it is now, or None when it was no longer (`from_status`, `generation`) or is gone."""
    record = await tx.fetchrow(
        f"""
        update hosts as h set status = $4, generation = generation + 1
        where h.id = $1 and h.status = $2 and h.generation = $3 and h.deleted_at is null
        returning {_COLUMNS}
        """,
        host_id,
        from_status,
        generation,
        to_status,
    )
    return one(HostRow, record)


async def is_told_down(tx: Connection, host_id: UUID, team_id: UUID | None) -> bool:
    """Whether the last that the audit trail has of a host of that team is that it went away."""
    last = await tx.fetchval(
        f"""
        select action from audit_logs
        where {"team_id is null" if team_id is None else "team_id = $2"} and scope = 'admin'
          and resource_type = 'host' and action in ('marked_down', 'marked_up') and resource_id = $1
        order by created_at desc, id desc limit 1
        """,
        f"host-{host_id}",
        *([] if team_id is None else [team_id]),
    )
    return bool(last == "marked_down")
