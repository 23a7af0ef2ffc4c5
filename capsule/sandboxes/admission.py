"""What has to hold before a sandbox is made, and the one transaction that writes it down.

Everything here runs inside a transaction and may be run again from the start.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import msgspec

from agent.wire.lifecycle import Status
from capsule import errors
from capsule.db.queries import idempotency, sandboxes, teams, templates
from capsule.sandboxes.rows import found, record

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.queries.idempotency import IdempotencyRow
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.model import CreateSandbox, Principal


@dataclass(frozen=True)
class NewSandbox:
    """What the transaction writes down."""

    principal: Principal
    request: CreateSandbox
    idempotency_key: str | None
    host: UUID
    settings: Settings


async def insert(tx: Connection, new: NewSandbox) -> tuple[SandboxRow, bool]:
    """The one transaction: quota, idempotency, row, audit. The row, and whether it is this request's."""
    sandbox, principal, request = uuid4(), new.principal, new.request
    if new.idempotency_key is not None:
        taken = await idempotency.claim(tx, principal.team_id, new.idempotency_key, fingerprint(request), sandbox)
        if taken is not None:
            return found(await sandboxes.get_any(tx, same_request(taken, request))), False
    await check_allowed(tx, principal, request)
    deadline = datetime.now(UTC) + timedelta(seconds=new.settings.create_timeout)
    row = await sandboxes.insert(
        tx,
        id=sandbox,
        team_id=principal.team_id,
        template=request.template,
        vcpus=request.vcpus,
        memory_mb=request.memory_mb,
        disk_mb=new.settings.disk_mb,
        timeout_sec=request.timeout_sec,
        metadata=dict(request.metadata),
        transition_deadline=deadline,
    )
    await record(tx, principal, sandbox, "create", "success", {"template": request.template})
    placed = await sandboxes.change_status(
        tx,
        sandbox,
        from_status=row.status,
        generation=row.generation,
        to_status=Status.STARTING,
        host_id=new.host,
        transition_deadline=deadline,
    )
    return found(placed), True


async def examine(tx: Connection, principal: Principal, request: CreateSandbox, key: str | None) -> SandboxRow | None:
    """What would have become of a request that found no host: the sandbox an earlier one made, or a refusal."""
    taken = None if key is None else await idempotency.get(tx, principal.team_id, key)
    if taken is not None:
        return await sandboxes.get_any(tx, same_request(taken, request))
    await check_allowed(tx, principal, request)
    return None


def same_request(claim: IdempotencyRow, request: CreateSandbox) -> UUID:
    """The sandbox that a used key stands for. IdempotencyKeyReused when it was used for something else."""
    if claim.request_sha256 != fingerprint(request):
        raise errors.IdempotencyKeyReused("this Idempotency-Key was used for a different request; use a new one")
    return claim.resource_id


async def check_allowed(tx: Connection, principal: Principal, request: CreateSandbox) -> None:
    """The team's limits, and the template. QuotaExceeded names the limit that was hit; NoTeam, NotFound."""
    limits = await teams.limits(tx, principal.team_id)
    if limits is None:
        raise errors.NoTeam("your team was deleted")
    live = await sandboxes.count_live(tx, principal.team_id)
    for name, wanted, limit in (
        ("max_vcpus", request.vcpus, limits.max_vcpus),
        ("max_memory_mb", request.memory_mb, limits.max_memory_mb),
        ("max_sandboxes", live + 1, limits.max_sandboxes),
    ):
        if wanted > limit:
            raise errors.QuotaExceeded(f"{name} of your team is {limit}, this needs {wanted}", limit=name)
    if await templates.get_by_name(tx, principal.team_id, request.template) is None:
        raise errors.NotFound(f"there is no template {request.template!r}; GET /v1/snapshots lists them")


def fingerprint(request: CreateSandbox) -> bytes:
    """SHA-256 of what was asked for, the same for the same request."""
    return hashlib.sha256(msgspec.json.encode(request, order="sorted")).digest()
