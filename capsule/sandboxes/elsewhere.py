"""A host that has no room for what it was to start: the sandbox goes to another one.

The scheduler places by the rows, which know nothing of what else takes a host's memory and disk: the host itself has
the last word. The row is moved first (compare-and-set): from then on whatever the first host makes of it is nobody's.
Then that host is told so, and remembers it: when somebody else asks it just then to start the sandbox, it does not.
Only then the other one is asked. Whoever dies in between leaves a row that is starting, like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog

from agent.wire import calls
from agent.wire.faults import Fault
from capsule import errors
from capsule.db.errors import ConstraintViolated, DatabaseUnavailable
from capsule.db.queries import hosts, sandboxes, teams, templates
from capsule.sandboxes.admission import Shape, host_tags

if TYPE_CHECKING:
    from uuid import UUID

    from capsule.db.connection import Connection
    from capsule.db.queries.sandboxes import SandboxRow
    from capsule.hosts.links import HostLinks
    from capsule.sandboxes.rows import SandboxRows
    from capsule.scheduler.placement import Wish
    from capsule.scheduler.scheduler import Scheduler

log = structlog.get_logger()

MAX_HOSTS = 5
"""That one create asks: when so many have no room, the rows are far from the truth, and its caller should hear so."""
FENCE_TIMEOUT = 5.0
"""Seconds the first host has to hear that the sandbox is not its own; else the monitor ends what it makes."""


@dataclass
class Elsewhere:
    """Other hosts for one create."""

    rows: SandboxRows
    links: HostLinks
    scheduler: Scheduler
    refused: set[UUID] = field(default_factory=set)

    async def move(self, row: SandboxRow) -> SandboxRow | None:
        """The row on another host with room for it, after its own has refused it. None when there is no other, or
        somebody has changed the row."""
        assert row.host_id is not None  # noqa: S101 - it is starting there
        self.refused.add(row.host_id)
        if len(self.refused) >= MAX_HOSTS:
            return None
        try:
            wish = replace(await self.rows.run(_wish, row), refused=frozenset(self.refused))
            async with self.scheduler.reserve(wish) as host:
                moved = await self.rows.patiently(_move, row, host)
        except (errors.CapsuleError, ConstraintViolated, DatabaseUnavailable, Fault) as err:
            log.info("sandbox_stays", reason=str(err))
            return None
        if moved is not None:
            log.warning("sandbox_moved", sandbox_id=str(row.id), from_host=str(row.host_id), to_host=str(moved.host_id))
            await self._fence(row.host_id, row.id)
        return moved

    async def _fence(self, host: UUID, sandbox: UUID) -> None:
        body = calls.body_of(calls.SandboxRef(sandbox_id=str(sandbox)))
        try:
            await self.links.call(host, "sandbox.destroy", body, timeout=FENCE_TIMEOUT)
        except Fault as fault:
            log.warning("host_not_told", host_id=str(host), code=fault.code, message=fault.message)


async def _move(tx: Connection, row: SandboxRow, host: UUID) -> SandboxRow | None:
    """To a host that is still open; None, too, when somebody has closed it since it was chosen."""
    move = sandboxes.move if await hosts.hold_open(tx, host) else sandboxes.moved
    return await move(tx, row.id, row.generation, host)


async def _wish(tx: Connection, row: SandboxRow) -> Wish:
    """What it was first placed by, as far as that is still so."""
    among = None if row.template_id is None else frozenset(await templates.hosts_of(tx, row.template_id))
    shape = Shape(
        vcpus=row.vcpus,
        memory_mb=row.memory_mb,
        disk_mb=row.disk_mb,
        hosts=among,
        byoc=row.team_id if await teams.is_byoc(tx, row.team_id) else None,
        tags=host_tags(row.metadata),
    )
    return shape.wish()
