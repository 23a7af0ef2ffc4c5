"""What has to hold before a sandbox is forked, and the one transaction that writes its children down.

Everything here runs inside a transaction and may be run again from the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid5

from agent.wire.lifecycle import Status
from capsule.db.queries import hosts, idempotency, sandboxes, templates
from capsule.sandboxes.admission import HostClosed, Shape, check_allowed, fingerprint, same_request
from capsule.sandboxes.rows import found, record, wrong_status

if TYPE_CHECKING:
    from capsule.db.connection import Connection
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.principals import Principal

ENDPOINT = "POST /v1/sandboxes/fork"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkRequest:
    """What was asked for; the same for the same request."""

    fork: UUID
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Children:
    """What the transaction writes down. `id` names the fork: its snapshot, and by their number its children."""

    id: UUID
    principal: Principal
    source: SandboxRow
    request: ForkRequest
    idempotency_key: str | None
    seconds: float


def shape(source: SandboxRow) -> Shape:
    """Of each child: the source's."""
    return Shape(vcpus=source.vcpus, memory_mb=source.memory_mb, disk_mb=source.disk_mb)


def child(fork: UUID, number: int) -> UUID:
    """The id of a fork's child: found again without a list of them."""
    return uuid5(fork, str(number))


async def children(tx: Connection, fork: UUID, count: int) -> list[SandboxRow]:
    """Every child of a fork that was written down, in their order."""
    ids = [child(fork, number) for number in range(count)]
    rows = await sandboxes.get_many(tx, ids)
    return [found(rows.get(one)) for one in ids]


async def admit(tx: Connection, principal: Principal, request: ForkRequest) -> SandboxRow:
    """The source, which runs, when the team may have that many more. NotFound, InvalidState, QuotaExceeded, NoTeam."""
    source = found(await sandboxes.get(tx, principal.team_id, request.fork))
    if source.status != Status.RUNNING:
        raise wrong_status(source)
    await check_allowed(tx, principal, shape(source), request.count)
    return source


async def insert(tx: Connection, new: Children) -> list[SandboxRow] | None:
    """The one transaction: idempotency, quota, rows, audit. None when the key was used meanwhile. HostClosed."""
    principal, source, request = new.principal, new.source, new.request
    if (done := await sandboxes.get_any(tx, child(new.id, 0))) is not None and done.generation > 1:
        return await children(tx, new.id, request.count)  # committed, and the answer was lost
    if new.idempotency_key is not None:
        claim = await idempotency.claim(
            tx, principal.team_id, new.idempotency_key, fingerprint(request), new.id, endpoint=ENDPOINT
        )
        if claim is not None:
            if same_request(claim, request) != new.id:
                return None
            return await children(tx, new.id, request.count)  # ours: committed after we had looked
    await check_allowed(tx, principal, shape(source), request.count)
    template = source.template_id
    if template is not None and not await templates.hold(tx, template):
        template = None  # deleted since, with the source
    if source.host_id is None or not await hosts.hold_open(tx, source.host_id):
        raise HostClosed
    return [await _insert_child(tx, new, number, template) for number in range(request.count)]


async def _insert_child(tx: Connection, new: Children, number: int, template: UUID | None) -> SandboxRow:
    source = new.source
    deadline = datetime.now(UTC) + timedelta(seconds=new.seconds)
    row = await sandboxes.insert(
        tx,
        id=child(new.id, number),
        team_id=source.team_id,
        template=source.template,
        template_id=template,
        vcpus=source.vcpus,
        memory_mb=source.memory_mb,
        disk_mb=source.disk_mb,
        timeout_sec=source.timeout_sec,
        metadata=source.metadata,
        transition_deadline=deadline,
    )
    metadata = {"template": source.template, "fork_of": f"sb-{source.id}"}
    await record(tx, new.principal, row.id, "create", "success", metadata)
    placed = await sandboxes.change_status(
        tx,
        row.id,
        from_status=row.status,
        generation=row.generation,
        to_status=Status.STARTING,
        host_id=source.host_id,
        transition_deadline=deadline,
    )
    return found(placed)
