"""What may not be collected although no manifest refers to it."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from uuid import UUID

from agent.snapshots.errors import SnapshotExists


@dataclass(slots=True)
class Hold:
    """The builds and layers that one unfinished snapshot is made of."""

    builds: set[UUID] = field(default_factory=set)
    layers: set[UUID] = field(default_factory=set)


class Holds:
    """Unfinished snapshots and pins of one process. Every look and change happens under `lock`.

    The same lock makes "it is there and is referred to from now on" one step: it is held while a snapshot gets its
    name, and while garbage is chosen and set aside.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._drafts: dict[UUID, Hold] = {}
        self._pins: dict[str, frozenset[UUID]] = {}

    def begin(self, snapshot_id: UUID) -> Hold:
        """Claim an id. Raises SnapshotExists."""
        with self.lock:
            if snapshot_id in self._drafts:
                raise SnapshotExists(f"the snapshot {snapshot_id} is being made already")
            hold = self._drafts[snapshot_id] = Hold()
            return hold

    def end(self, snapshot_id: UUID) -> None:
        """Give the id and what is held for it free; harmless when done already."""
        with self.lock:
            self._drafts.pop(snapshot_id, None)

    def pin(self, owner: str, layers: Collection[UUID]) -> None:
        """Hold these layers instead of those that the owner had pinned; none: unpin."""
        with self.lock:
            self._pins[owner] = frozenset(layers)
            if not layers:
                del self._pins[owner]

    def drafts(self) -> frozenset[UUID]:
        """The ids of unfinished snapshots."""
        with self.lock:
            return frozenset(self._drafts)

    def builds(self) -> set[UUID]:
        """All builds that are held."""
        with self.lock:
            return {build for hold in self._drafts.values() for build in hold.builds}

    def pinned(self) -> frozenset[UUID]:
        """All layers that are pinned."""
        with self.lock:
            return frozenset(layer for layers in self._pins.values() for layer in layers)

    def layers(self) -> set[UUID]:
        """All layers that are held or pinned."""
        with self.lock:
            return {layer for hold in self._drafts.values() for layer in hold.layers} | self.pinned()
