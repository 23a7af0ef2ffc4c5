"""Proves that a host is where it says: whoever has a registration token can claim any address.

The control plane dials the address; the certificate pinned at registration, shown there, is the proof, since only that
host has its key. Until then the host is not online, and its claim holds nothing against others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import structlog
import trio

from agent.actor.supervise import RestartPolicy
from agent.wire.faults import Fault
from capsule.db.errors import ConstraintViolated
from capsule.db.queries import audit, hosts

if TYPE_CHECKING:
    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.db.queries.hosts import HostRow
    from capsule.hosts.directory import Endpoint
    from capsule.hosts.links import HostLinks

log = structlog.get_logger()

TIMEOUT = 10.0
BACKOFF = RestartPolicy(first_delay=0.5, max_delay=15.0)
"""Between attempts: a host that registered without being there, or where another one is, may come all the same."""
ADDRESS_KEY = "hosts_address_key"


async def prove_address(host: UUID, db: Database, links: HostLinks) -> bool:
    """Return when the host is proven to be at its address, however long that takes; False when there is no such host.

    Raises DatabaseUnavailable.
    """
    failures = 0
    while True:
        row = await db.run(hosts.get, host)
        if row is None or row.credentials_revoked_at is not None:
            return False
        if row.proven:
            return True
        refusal = await _try(row, db, links)
        if refusal is None:
            return True
        failures += 1
        log.warning("address_not_proven", host_id=str(host), address=row.address, reason=refusal, failures=failures)
        await trio.sleep(BACKOFF.delay(failures))


async def _try(row: HostRow, db: Database, links: HostLinks) -> str | None:
    """One dial; why the address is not proven, or None when it is."""
    try:
        endpoint = await links.reach(row.id, timeout=TIMEOUT)
    except Fault as fault:
        return fault.message
    if endpoint.epoch != row.credential_epoch:
        links.forget(row.id)  # of an earlier registration
        return "the connection is an earlier registration's"
    try:
        proven = await db.transaction(_prove, row, endpoint)
    except ConstraintViolated as err:
        if err.name != ADDRESS_KEY:
            raise
        return "another host is proven to be there; delete that one if it is no more"
    if not proven:
        links.forget(row.id)  # what was dialled may be no more what is on the row
        return "the host's row was changed meanwhile"
    return None


async def _prove(tx: Connection, row: HostRow, endpoint: Endpoint) -> bool:
    proven = await hosts.prove(
        tx,
        row.id,
        from_status=row.status,
        generation=row.generation,
        epoch=endpoint.epoch,
        address=endpoint.address,
        cert_fingerprint=endpoint.fingerprint,
    )
    if proven is None:
        return False
    if row.status == "unreachable":
        await audit.append(
            tx,
            actor_type="system",
            actor_id=None,
            actor_name="monitor",
            team_id=row.team_id,
            resource_type="host",
            resource_id=f"host-{row.id}",
            action="marked_up",
            scope="admin",
        )
    log.info("host_address_proven", host_id=str(row.id), address=endpoint.address, status=proven.status)
    return True
