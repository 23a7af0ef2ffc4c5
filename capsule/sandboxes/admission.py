"""What has to hold before a sandbox is made, and the one transaction that writes it down.

Everything here runs inside a transaction and may be run again from the start.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import msgspec

from agent.wire.calls import VMM_MEMORY_MB
from agent.wire.lifecycle import Status
from capsule import errors
from capsule.db.queries import hosts, idempotency, sandboxes, teams, templates
from capsule.sandboxes.rows import found, record
from capsule.scheduler.placement import Size, Wish

if TYPE_CHECKING:
    from collections.abc import Mapping

    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.queries.idempotency import IdempotencyRow
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.model import CreateSandbox
    from capsule.principals import Principal


DEFAULT_VCPUS, DEFAULT_MEMORY_MB = 1, 512
"""Of a sandbox from a base image, when the request names none."""

HOST_TAGS = "host_tags"
"""The key of a sandbox's metadata that names the tags its host has to have, separated by commas."""
HOST_TAG = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._:=-]{0,63}")
"""As the table of hosts' tags has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a request comes to with its template. `snapshot` and `hosts` (those that have it) None: a base image.
    `byoc`: the team, when it brings its own hosts. `tags`: what its host has to have."""

    vcpus: int
    memory_mb: int
    disk_mb: int
    snapshot: UUID | None = None
    hosts: frozenset[UUID] | None = None
    byoc: UUID | None = None
    tags: frozenset[str] = frozenset()

    def size(self) -> Size:
        """What its host has to have to spare."""
        return Size(vcpus=self.vcpus, memory_mb=self.memory_mb + VMM_MEMORY_MB, disk_mb=self.disk_mb)

    def wish(self) -> Wish:
        """For the scheduler."""
        return Wish(size=self.size(), team=self.byoc, tags=self.tags, among=self.hosts)


@dataclass(frozen=True)
class NewSandbox:
    """What the transaction writes down."""

    principal: Principal
    request: CreateSandbox
    idempotency_key: str | None
    shape: Shape
    host: UUID
    settings: Settings


class HostClosed(errors.NoHostsAvailable):
    """The host was closed, or has gone, since it was chosen."""

    def __init__(self) -> None:
        super().__init__("the host was closed just now; try again", retry_after=1)


async def shape_of(tx: Connection, principal: Principal, request: CreateSandbox, disk_mb: int) -> Shape:
    """What is to be made, from which template; `disk_mb` is a base image's. NotFound; InvalidRequest naming a field
    that the template has fixed otherwise, or `metadata`; Conflict when no host has it any more."""
    tags = host_tags(request.metadata)
    template = await templates.get_by_name(tx, principal.team_id, request.template)
    if template is None:
        raise no_template(request.template)
    for field, wanted, baked in (
        ("vcpus", request.vcpus, template.vcpus),
        ("memory_mb", request.memory_mb, template.memory_mb),
    ):
        if baked is not None and wanted is not None and wanted != baked:
            raise errors.InvalidRequest(
                f"{field}: the template {template.name} fixes it to {baked}; leave it out", field=field
            )
    among = None
    if template.type == "snapshot" and not (among := frozenset(await templates.hosts_of(tx, template.id))):
        if await templates.get_by_name(tx, principal.team_id, request.template) is None:
            raise no_template(request.template)  # deleted between the two looks
        raise errors.Conflict(f"no host has a copy of {template.name} any more; delete it and make a new one")
    return Shape(
        vcpus=template.vcpus or request.vcpus or DEFAULT_VCPUS,
        memory_mb=template.memory_mb or request.memory_mb or DEFAULT_MEMORY_MB,
        disk_mb=template.disk_mb or disk_mb,
        snapshot=template.id if among is not None else None,
        hosts=among,
        byoc=principal.team_id if await teams.is_byoc(tx, principal.team_id) else None,
        tags=tags,
    )


def host_tags(metadata: Mapping[str, str]) -> frozenset[str]:
    """The tags that a sandbox's host has to have, as its metadata asks for them. InvalidRequest."""
    if HOST_TAGS not in metadata:
        return frozenset()
    tags = [tag.strip(" ") for tag in metadata[HOST_TAGS].split(",")]
    if not all(HOST_TAG.fullmatch(tag) for tag in tags):
        raise errors.InvalidRequest(f"metadata: {HOST_TAGS} must be tags of hosts, like gpu,eu", field="metadata")
    return frozenset(tags)


def no_template(name: str) -> errors.NotFound:
    """For a name that the team has no template of."""
    return errors.NotFound(f"there is no template {name!r}; GET /v1/snapshots lists them")


async def insert(tx: Connection, new: NewSandbox) -> tuple[SandboxRow, bool]:
    """The one transaction: quota, idempotency, row, audit. The row, and whether it is this request's. HostClosed."""
    sandbox, principal, request, shape = uuid4(), new.principal, new.request, new.shape
    if new.idempotency_key is not None:
        taken = await idempotency.claim(tx, principal.team_id, new.idempotency_key, fingerprint(request), sandbox)
        if taken is not None:
            return found(await sandboxes.get_any(tx, same_request(taken, request))), False
    await check_allowed(tx, principal, shape)
    if shape.snapshot is not None and not await templates.hold(tx, shape.snapshot):
        raise no_template(request.template)
    if not await hosts.hold_open(tx, new.host):
        raise HostClosed
    deadline = datetime.now(UTC) + timedelta(seconds=new.settings.create_timeout)
    row = await sandboxes.insert(
        tx,
        id=sandbox,
        team_id=principal.team_id,
        template=request.template,
        template_id=shape.snapshot,
        vcpus=shape.vcpus,
        memory_mb=shape.memory_mb,
        disk_mb=shape.disk_mb,
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


async def examine(
    tx: Connection, principal: Principal, request: CreateSandbox, shape: Shape, key: str | None
) -> SandboxRow | None:
    """What would have become of a request that found no host: the sandbox an earlier one made, or a refusal."""
    refusal: errors.CapsuleError | None = None
    try:
        await check_allowed(tx, principal, shape)
    except errors.CapsuleError as err:
        refusal = err
    # Only now, with the team's row locked: a sandbox that was counted above is there together with its key.
    taken = None if key is None else await idempotency.get(tx, principal.team_id, key)
    if taken is not None:
        return await sandboxes.get_any(tx, same_request(taken, request))
    if refusal is not None:
        raise refusal
    return None


def same_request(claim: IdempotencyRow, request: object) -> UUID:
    """What a used key stands for. IdempotencyKeyReused when it was used for something else."""
    if claim.request_sha256 != fingerprint(request):
        raise errors.IdempotencyKeyReused("this Idempotency-Key was used for a different request; use a new one")
    return claim.resource_id


async def check_allowed(tx: Connection, principal: Principal, shape: Shape, count: int = 1) -> None:
    """The team's limits. QuotaExceeded names the one that was hit; NoTeam.

    Leaves the team's row locked. It comes before any lock on what is the team's, such as a template: deleting a team
    takes them in this order, too. The limits are read behind it, or they would be those of a team that is gone by now.
    """
    live = await sandboxes.count_live(tx, principal.team_id)
    limits = await teams.limits(tx, principal.team_id)
    if limits is None:
        raise errors.NoTeam("your team was deleted")
    for name, wanted, limit in (
        ("max_vcpus", shape.vcpus, limits.max_vcpus),
        ("max_memory_mb", shape.memory_mb, limits.max_memory_mb),
        ("max_sandboxes", live + count, limits.max_sandboxes),
    ):
        if wanted > limit:
            raise errors.QuotaExceeded(f"{name} of your team is {limit}, this needs {wanted}", limit=name)


def fingerprint(request: object) -> bytes:
    """SHA-256 of what was asked for, the same for the same request."""
    return hashlib.sha256(msgspec.json.encode(request, order="sorted")).digest()
