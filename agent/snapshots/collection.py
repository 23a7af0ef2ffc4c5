"""Removing what no snapshot needs. Reference counts are not kept: they are read from the manifests each time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import structlog

from agent.snapshots import files, manifest
from agent.snapshots.errors import ManifestDamaged, StoreFailed
from agent.snapshots.holds import Holds
from agent.snapshots.layout import LAYER_SUFFIX, PARTIAL, REMOVED, Layout, ids, remove_tree, set_aside

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class References:
    """The builds and layers that a manifest refers to, and which file said so."""

    file: tuple[int, ...]
    builds: frozenset[UUID]
    layers: frozenset[UUID]


class Collector:
    """Finds and removes builds, layers and rubbish. Raises OSError."""

    def __init__(self, layout: Layout, holds: Holds) -> None:
        self._layout = layout
        self._holds = holds
        self._known: dict[UUID, References] = {}

    def collect(self, pinned_layers: Collection[UUID]) -> None:
        """Remove builds and layers that no manifest, no draft and no pin refers to, and what was set aside.

        A manifest that cannot be read may refer to anything: nothing but rubbish goes then.
        """
        with self._holds.lock:
            garbage = self._garbage(set(pinned_layers))
            if garbage:
                # A name that was taken away may still be on the disk: it must not come back without its data.
                files.sync_directory(self._layout.snapshots)
            for path in garbage:
                set_aside(path)
            rubbish = list(self._rubbish())
        if garbage:
            log.info("snapshot_parts_collected", count=len(garbage))
        for path in rubbish:
            remove_tree(path)

    def remove_rubbish(self) -> None:
        """Remove what was set aside and drafts that nobody works on."""
        with self._holds.lock:
            rubbish = list(self._rubbish())
        for path in rubbish:
            remove_tree(path)

    def _garbage(self, layers: set[UUID]) -> list[Path]:
        try:
            builds = self._holds.builds()
            layers |= self._holds.layers()
            for references in self._references():
                builds |= references.builds
                layers |= references.layers
        except (ManifestDamaged, StoreFailed) as err:
            log.warning("snapshot_collection_refused", error=str(err))
            return []
        layout = self._layout
        garbage = [layout.build(build) for build in ids(layout.builds) if build not in builds]
        present = ids(layout.layers, suffix=LAYER_SUFFIX)
        return garbage + [layout.layer(layer) for layer in present if layer not in layers]

    def _references(self) -> Iterator[References]:
        """What every snapshot refers to. Raises ManifestDamaged, StoreFailed."""
        present = set(ids(self._layout.snapshots))
        for snapshot_id in self._known.keys() - present:
            del self._known[snapshot_id]
        for snapshot_id in present:
            directory = self._layout.snapshot(snapshot_id)
            known = self._known.get(snapshot_id)
            file = _identity(directory / manifest.MANIFEST)
            if known is None or known.file != file:
                found = manifest.read(directory)
                known = References(file, frozenset(found.builds), frozenset(found.layers))
                self._known[snapshot_id] = known
            yield known

    def _rubbish(self) -> Iterator[Path]:
        for directory in self._layout.directories:
            for path in directory.iterdir():
                if path.name.startswith(REMOVED):
                    yield path
        for snapshot_id in set(ids(self._layout.snapshots, prefix=PARTIAL)) - self._holds.drafts():
            yield self._layout.partial(snapshot_id)


def _identity(path: Path) -> tuple[int, ...]:
    """What is another one when the file was replaced or written to."""
    try:
        found = path.stat()
    except OSError as err:
        raise ManifestDamaged(f"the manifest of a snapshot cannot be read: {err}") from err
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
