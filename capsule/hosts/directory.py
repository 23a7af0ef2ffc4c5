"""Where the agents of live hosts are, and which certificate each must show. Read from the database at every dial: dials
are rare, and a remembered row is how one ends up at the wrong machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    from capsule.db.pool import Database


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One agent. `fingerprint`: hex SHA-256 of its certificate; `epoch`: which registration of the host it is of."""

    address: str
    fingerprint: str
    epoch: int
