"""The snapshots of a host, and the memory builds and disk layers that they share.

A snapshot is there when its directory has its name, which is the last thing that happens to it; builds and layers are
there as long as a manifest, an unfinished snapshot or a pin refers to them. Killed between any two steps, a process
leaves nothing but what `prepare` and `collect` of the next one remove.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import msgspec
import structlog

from agent.snapshots import compaction, files, loading, manifest
from agent.snapshots.collection import Collector
from agent.snapshots.drafts import Draft
from agent.snapshots.errors import ManifestDamaged, SnapshotMissing, StoreFailed
from agent.snapshots.holds import Holds
from agent.snapshots.layout import Layout, ids, remove_tree, set_aside
from agent.snapshots.loading import Snapshot
from agent.snapshots.manifest import Kind, Manifest
from agent.snapshots.memory import MemoryReader

log = structlog.get_logger()

SECTOR_BYTES = 512
"""The unit of st_blocks, whatever the file system's own."""

Flatten = Callable[[tuple[Path, ...], Path], None]
"""Writes the content of several layers, bottom to top, as one new layer."""


@dataclass(frozen=True, slots=True)
class ManifestSummary:
    """A snapshot as it is listed. `manifest`: None when it cannot be read; `damage` says why."""

    id: UUID
    manifest: Manifest | None
    damage: str = ""


class SnapshotStore:
    """See above. One per host and process, for any number of threads; every method blocks on the disk.

    Raises HostDiskFull and StoreFailed for what the file system says.
    """

    def __init__(self, root: Path) -> None:
        self._layout = Layout(root)
        self._holds = Holds()
        self._collector = Collector(self._layout, self._holds)
        self._collected = False

    def prepare(self) -> None:
        """Make the directories and drop what an earlier process left unfinished; nothing that could be needed."""
        with files.reported(f"preparing {self._layout.root}"):
            for directory in (self._layout.root, *self._layout.directories):
                files.provide_directory(directory)
            self._collector.remove_rubbish()

    def draft(self, snapshot_id: UUID) -> Draft:
        """Begin a snapshot; a context manager. Raises SnapshotExists."""
        return Draft(self._layout, self._holds, snapshot_id)

    def load(self, snapshot_id: UUID) -> Snapshot:
        """A snapshot, checked: all but the content of builds and layers. Raises SnapshotMissing, SnapshotDamaged."""
        return loading.load(self._layout, snapshot_id)

    def copy(self, source: UUID, snapshot_id: UUID, *, kind: Kind, owner: str) -> Snapshot:
        """Make another snapshot of the same builds and layers. Raises like `load`, and SnapshotExists."""
        with self.draft(snapshot_id) as draft:
            found = self._held(source, draft)
            draft.write_header(found.header)
            description = msgspec.structs.replace(found.manifest.description, kind=kind, owner=owner)
            return draft.publish(description, found.manifest.layers)

    def compact(
        self,
        source: UUID,
        snapshot_id: UUID,
        flatten_layers: Flatten | None = None,
        *,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Snapshot:
        """Make another snapshot of the same content with one build, and with `flatten_layers` one layer.

        `should_stop` is asked between chunks. Raises like `load`, SnapshotExists, CompactionStopped.
        """
        with self.draft(snapshot_id) as draft:
            found = self._held(source, draft)
            with MemoryReader(found.header, self._layout.builds) as memory:
                draft.write_header(compaction.rewrite(memory, draft.new_build(), should_stop=should_stop))
            layers = found.manifest.layers
            if flatten_layers is not None and len(layers) > 1:
                merged = draft.directory / "merged"
                flatten_layers(found.layers, merged)
                layers = (draft.add_layer(merged),)
                with files.reported(f"removing {merged}"):
                    files.unlink(merged)
            return draft.publish(found.manifest.description, layers)

    def remove(self, snapshot_id: UUID) -> None:
        """Remove a snapshot and what only it needed; harmless when it is gone.

        Before the first `collect`, which knows what VMs use, only the snapshot itself goes.
        """
        with files.reported(f"removing the snapshot {snapshot_id}"):
            rubbish = None
            with self._holds.lock:
                if self._layout.snapshot(snapshot_id).exists():
                    rubbish = set_aside(self._layout.snapshot(snapshot_id))
            if rubbish is not None:
                files.sync_directory(self._layout.snapshots)
                remove_tree(rubbish)
            if self._collected:
                self._collector.collect(())

    def collect(self, pinned_layers: Collection[UUID]) -> None:
        """Remove builds and layers that no manifest, no unfinished snapshot and no pin refers to.

        `pinned_layers` count for this time, `pin` for ever. While a manifest cannot be read, nothing goes.
        """
        with files.reported("collecting unused parts of snapshots"):
            self._collector.collect(pinned_layers)
        self._collected = True

    def pin(self, owner: str, layers: Collection[UUID]) -> None:
        """Keep layers that a VM of `owner` uses, instead of those pinned before; none: keep none.

        Pins live as long as this object. A pinned layer also outlives the unfinished snapshot that made it.
        """
        self._holds.pin(owner, layers)

    def list(self) -> builtins.list[ManifestSummary]:
        """All snapshots, also damaged ones, oldest first."""
        found = []
        with files.reported("listing snapshots"):
            for snapshot_id in ids(self._layout.snapshots):
                directory = self._layout.snapshot(snapshot_id)
                try:
                    found.append(ManifestSummary(snapshot_id, manifest.read(directory)))
                except (ManifestDamaged, StoreFailed) as err:
                    if directory.exists():
                        found.append(ManifestSummary(snapshot_id, None, str(err)))
        return sorted(found, key=lambda each: ("" if each.manifest is None else str(each.manifest.created_at), each.id))

    def allocated_bytes(self, snapshot_id: UUID) -> int:
        """What a snapshot takes on the disk, shared parts included. Raises SnapshotMissing, ManifestDamaged."""
        directory = self._layout.snapshot(snapshot_id)
        try:
            found = manifest.read(directory)
        except ManifestDamaged as err:
            if not directory.exists():
                raise SnapshotMissing(f"there is no snapshot {snapshot_id} in {self._layout.snapshots}") from err
            raise
        layers = [self._layout.layer(layer) for layer in found.layers]
        return sum(_allocated(path) for path in (directory, *map(self._layout.build, found.builds), *layers))

    def snapshot_directory(self, snapshot_id: UUID) -> Path:
        """Where a snapshot lies."""
        return self._layout.snapshot(snapshot_id)

    def build_directory(self, build: UUID) -> Path:
        """Where a memory build lies."""
        return self._layout.build(build)

    def layer_path(self, layer: UUID) -> Path:
        """Where a disk layer lies."""
        return self._layout.layer(layer)

    @property
    def builds(self) -> Path:
        """Where all memory builds lie."""
        return self._layout.builds

    def _held(self, source: UUID, draft: Draft) -> Snapshot:
        """Load a snapshot for `draft`, which takes its state and keeps its parts, even if it is removed from now on."""
        found = self.load(source)
        with self._holds.lock:  # nobody removes or collects it now
            try:
                same = manifest.read(found.directory) == found.manifest
            except ManifestDamaged:
                same = False
            if not same:
                raise SnapshotMissing(f"the snapshot {source} was removed while it was read")
            draft.hold(found.manifest.builds, found.manifest.layers)
            draft.link_state(found)
        return found


def _allocated(path: Path) -> int:
    """Bytes of a file or a directory with its files; what has just been removed takes none."""
    try:
        size = path.stat().st_blocks * SECTOR_BYTES
        if path.is_dir():
            with os.scandir(path) as entries:
                size += sum(entry.stat(follow_symlinks=False).st_blocks * SECTOR_BYTES for entry in entries)
    except FileNotFoundError:
        return 0
    return size
