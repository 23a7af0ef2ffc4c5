"""/v1/snapshots: freezing sandboxes under a name, and taking such templates back.

The template's id is the snapshot's on its hosts. A snapshot is made first and written down then, so that no row speaks
of one that is not there; deleting is the other way round. What is left over by whoever died in between is the
monitor's to remove.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog
import trio

from agent.wire import calls
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule import errors
from capsule.db.errors import ConstraintViolated
from capsule.db.queries import hosts, idempotency, sandboxes, teams, templates
from capsule.hosts.answers import parse_answer
from capsule.sandboxes.admission import fingerprint, no_template, same_request
from capsule.sandboxes.asking import persist
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.rows import found, record, wrong_status

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.db.queries.templates import TemplateRow
    from capsule.hosts.links import HostLinks
    from capsule.model import CreateSnapshot
    from capsule.principals import Principal
    from capsule.sandboxes.operations import Operations
    from capsule.sandboxes.pause import Pauser
    from capsule.sandboxes.rows import SandboxRows

log = structlog.get_logger()

FREEZABLE = frozenset({Status.RUNNING, Status.PAUSED})
MAX_BYTES = 2**63 - 1
ENDPOINT = "POST /v1/snapshots"
ID_GOOD_FOR = timedelta(seconds=450)
"""How long a snapshot that was not written down is taken up again under its id: half of the time after which the
monitor collects it, so that it is not collected between being asked for and being written down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A snapshot to be made: what it is called here and on the host, and of which sandbox. `made`: it is there."""

    id: UUID
    name: str
    source: SandboxRow
    idempotency_key: str | None
    made: TemplateRow | None = None


@dataclass(frozen=True, kw_only=True)
class Snapshots:
    """Makes and deletes the teams' templates."""

    rows: SandboxRows
    links: HostLinks
    operations: Operations
    pauser: Pauser
    settings: Settings

    async def create(self, principal: Principal, request: CreateSnapshot, idempotency_key: str | None) -> TemplateRow:
        """Freeze a running sandbox, which runs on, or a paused one; goes on when the caller goes away."""
        key = None if idempotency_key is None else (principal.team_id, idempotency_key, fingerprint(request))
        work = partial(self._create, principal, request, idempotency_key)
        return await self.operations.finish(work, key=key)

    async def _create(self, principal: Principal, request: CreateSnapshot, key: str | None) -> TemplateRow:
        plan = await self.rows.transaction(begin, principal, request, key)
        if plan.made is not None:
            return plan.made
        if request.pause and plan.source.status != Status.PAUSED:
            await self.pauser.pause(principal, request.sandbox)
        with structlog.contextvars.bound_contextvars(sandbox_id=str(request.sandbox), snapshot_id=str(plan.id)):
            size_bytes = await self._freeze(principal, plan)
            try:
                return await self.rows.patiently(_write_down, principal, plan, size_bytes)
            except (errors.NoTeam, errors.QuotaExceeded, errors.HostUnavailable) as err:
                failure: errors.CapsuleError = err
            except ConstraintViolated as err:
                if err.name != "templates_name_key":
                    raise
                failure = taken(plan.name)
            # The key first: from then on nobody writes it down, and what nobody wrote down may go.
            if await self._release(principal, plan):
                await self._remove(_host(plan.source), plan.id)
            raise failure

    async def _freeze(self, principal: Principal, plan: Plan) -> int:
        """Have the host make it; allocated bytes."""
        question = calls.CreateSnapshot(snapshot_id=str(plan.id), sandbox_id=str(plan.source.id))
        try:
            answer = await persist(
                self.links,
                _host(plan.source),
                "snapshot.create",
                calls.body_of(question),
                timeout=self.settings.pause_timeout,
                patience=self.settings.call_timeout,
            )
            return min(max(parse_answer(calls.SnapshotState, answer).size_bytes, 0), MAX_BYTES)
        except Fault as fault:
            log.warning("snapshot_not_made", code=fault.code, message=fault.message)
            if fault.code != FaultCode.INVALID_STATE or fault.details.get("object") != "snapshot":
                raise as_error(fault) from fault
        # An earlier request made it and took it back: under this id there will never be one.
        await self._release(principal, plan)
        raise _taken_back()

    async def _release(self, principal: Principal, plan: Plan) -> bool:
        """The key of a snapshot that is not to be is good for another one; else a repeat goes on with it. Whether it
        is none: another control plane may have made a template of it for a repeat."""
        try:
            return await self.rows.transaction(_release, principal, plan)
        except errors.DatabaseUnavailable:
            log.warning("idempotency_key_not_released", snapshot_id=str(plan.id))
            return False

    async def delete(self, principal: Principal, name: str) -> None:
        """Delete the team's template and tell every host that has a copy; the monitor tells those that are away."""
        await self.operations.finish(partial(self._delete, principal, name))

    async def _delete(self, principal: Principal, name: str) -> None:
        template, having = await self.rows.transaction(_mark_deleted, principal, name)
        async with trio.open_nursery() as nursery:
            for host in having:
                nursery.start_soon(self._take_back, host, template)

    async def _take_back(self, host: UUID, template: UUID) -> None:
        if await self._remove(host, template):
            try:
                await self.rows.transaction(templates.forget_copy, template, host)
            except errors.DatabaseUnavailable:
                log.warning("copy_not_forgotten", host_id=str(host), snapshot_id=str(template))

    async def _remove(self, host: UUID, snapshot: UUID) -> bool:
        """Whether the host has it no more."""
        body = calls.body_of(calls.SnapshotRef(snapshot_id=str(snapshot)))
        try:
            await self.links.call(host, "snapshot.remove", body, timeout=self.settings.call_timeout)
        except Fault as fault:
            log.warning("snapshot_stays", host_id=str(host), snapshot_id=str(snapshot), code=fault.code)
            return fault.code == FaultCode.NOT_FOUND
        return True


def _host(row: SandboxRow) -> UUID:
    assert row.host_id is not None  # noqa: S101 - it runs or rests there
    return row.host_id


def _taken_back() -> errors.Conflict:
    return errors.Conflict("the snapshot was removed before it became a template; repeat with a new Idempotency-Key")


def taken(name: str) -> errors.Conflict:
    """For a name that is not free."""
    return errors.Conflict(f"there is a template {name} already; choose another name or delete it")


async def begin(tx: Connection, principal: Principal, request: CreateSnapshot, key: str | None) -> Plan:
    """What is to be made, if it may be. With a key that was used: what was made then, or is to be made still."""
    snapshot, claim = uuid4(), None
    row = found(await sandboxes.get(tx, principal.team_id, request.sandbox))
    if key is not None:
        claim = await idempotency.claim(tx, principal.team_id, key, fingerprint(request), snapshot, endpoint=ENDPOINT)
        if claim is not None:
            snapshot = same_request(claim, request)
    have = await templates.count(tx, principal.team_id)  # with its lock: who else has this key is done, or waits
    made = await templates.get_any(tx, snapshot)
    if key is not None and made is None and claim is not None and datetime.now(UTC) - claim.created_at > ID_GOOD_FOR:
        await idempotency.release(tx, principal.team_id, key, snapshot)
        snapshot = uuid4()
        await idempotency.claim(tx, principal.team_id, key, fingerprint(request), snapshot, endpoint=ENDPOINT)
    name = request.name or f"{row.template[:55]}-{snapshot.hex[:8]}"
    if made is None:
        repeated = claim is not None and request.pause and row.status == Status.PAUSING  # perhaps by the first of them
        if row.status not in FREEZABLE and not repeated:
            raise wrong_status(row, "a running or paused one")
        if await templates.get_by_name(tx, principal.team_id, name) is not None:
            raise taken(name)
        await _check_room(tx, principal, have)
    return Plan(id=snapshot, name=name, source=row, idempotency_key=key, made=made)


async def _check_room(tx: Connection, principal: Principal, have: int) -> None:
    """Room for one more template than the team has. QuotaExceeded, NoTeam."""
    limits = await teams.limits(tx, principal.team_id)
    if limits is None:
        raise errors.NoTeam("your team was deleted")
    if have >= limits.max_templates:
        raise errors.QuotaExceeded(
            f"max_templates of your team is {limits.max_templates}; delete one first", limit="max_templates"
        )


async def _write_down(tx: Connection, principal: Principal, plan: Plan, size_bytes: int) -> TemplateRow:
    have = await templates.count(tx, principal.team_id)  # with its lock: who else writes this one down has done so
    if (made := await templates.get_any(tx, plan.id)) is not None:
        return made
    if not await _keeps_key(tx, principal, plan):
        raise _taken_back()
    await _check_room(tx, principal, have)
    if await hosts.hold(tx, _host(plan.source)) is None:
        raise errors.HostUnavailable("the sandbox's host was deleted, and the snapshot with it")
    row = await templates.insert_snapshot(
        tx,
        id=plan.id,
        team_id=principal.team_id,
        name=plan.name,
        vcpus=plan.source.vcpus,
        memory_mb=plan.source.memory_mb,
        disk_mb=plan.source.disk_mb,
        size_bytes=size_bytes,
        host_id=_host(plan.source),
    )
    metadata = {"name": plan.name, "sandbox_id": f"sb-{plan.source.id}"}
    await record(tx, principal, plan.id, "create", "success", metadata, kind="snapshot")
    return row


async def _keeps_key(tx: Connection, principal: Principal, plan: Plan) -> bool:
    """Whether its Idempotency-Key still stands for this snapshot: else the same request has failed elsewhere."""
    if plan.idempotency_key is None:
        return True
    claim = await idempotency.get(tx, principal.team_id, plan.idempotency_key)
    return claim is not None and claim.resource_id == plan.id


async def _release(tx: Connection, principal: Principal, plan: Plan) -> bool:
    await templates.count(tx, principal.team_id)  # for its lock: who writes this one down has done so, or will not
    if await templates.get_any(tx, plan.id) is not None:
        return False
    if plan.idempotency_key is not None:
        await idempotency.release(tx, principal.team_id, plan.idempotency_key, plan.id)
    return True


async def _mark_deleted(tx: Connection, principal: Principal, name: str) -> tuple[UUID, list[UUID]]:
    """The id of the template that is none any more, and the hosts that have copies."""
    template = await templates.take(tx, principal.team_id, name)
    if template is None:
        if await templates.get_by_name(tx, principal.team_id, name) is not None:
            raise errors.Forbidden(f"{name} is a template of the platform; only the platform can delete it")
        raise no_template(name)
    if users := await sandboxes.using_template(tx, template.id):
        raise errors.InUse(
            f"{len(users)} sandboxes that were made from {name} live or rest; destroy them first",
            sandbox_ids=[f"sb-{one}" for one in users],
        )
    await templates.mark_deleted(tx, template.id)
    await record(tx, principal, template.id, "delete", "warning", {"name": name}, kind="snapshot")
    return template.id, await templates.hosts_of(tx, template.id, lost=True)
