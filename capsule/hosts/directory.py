"""Where the agents of live hosts are, and which certificate each must show. Read from the database at every dial: dials
are rare, and a remembered row is how one ends up at the wrong machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from capsule.db.queries import hosts as rows

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID

    from capsule.db.pool import Database


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One agent. `fingerprint`: hex SHA-256 of its certificate; `epoch`: which registration of the host it is of;
    `earlier`: fingerprint of the certificate before the last renewal, which it has until the answer reaches it;
    `repeated`: of other answers to that renewal, any of which may be the one that reached it."""

    address: str
    fingerprint: str
    epoch: int
    earlier: str | None = None
    repeated: tuple[str, ...] = ()

    @property
    def pinned(self) -> tuple[str, ...]:
        """Fingerprints of all certificates that it may show, the newest first."""
        return (self.fingerprint, *self.repeated, *([self.earlier] if self.earlier else []))


class Directory:
    """Looks hosts up. Both methods raise DatabaseUnavailable."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def find(self, host: UUID) -> Endpoint | None:
        """None for a host that is deleted, has not registered yet, or has to register anew: its credentials ended."""
        row = await self._db.run(rows.get, host)
        return None if row is None else _endpoint(row)

    async def find_all(self, hosts: Collection[UUID]) -> dict[UUID, Endpoint]:
        """Those of `hosts` that live and are registered."""
        wanted = set(hosts)
        found = {row.id: _endpoint(row) for row in await self._db.run(rows.list_all) if row.id in wanted}
        return {host: endpoint for host, endpoint in found.items() if endpoint is not None}


def _endpoint(row: rows.HostRow) -> Endpoint | None:
    if row.address is None or row.cert_fingerprint is None or row.credentials_revoked_at is not None:
        return None
    return Endpoint(
        row.address,
        row.cert_fingerprint,
        row.credential_epoch,
        row.earlier_cert_fingerprint,
        tuple(row.repeated_cert_fingerprints),
    )
