"""Reading a snapshot, and checking that it is whole, before anything is started from it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from agent.snapshots import files, header_format, manifest
from agent.snapshots.blocks import DATA, SUMS
from agent.snapshots.errors import (
    DataDamaged,
    HeaderDamaged,
    LayerMissing,
    ManifestDamaged,
    SnapshotDamaged,
    SnapshotMissing,
    StateDamaged,
)
from agent.snapshots.header import COMPACT_AT, Header
from agent.snapshots.layout import WORKING_SET, Layout
from agent.snapshots.manifest import HEADER, STATE, FileRecord, Manifest

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that can be resumed from. `layers`: bottom to top. `working_set`: may not be there."""

    id: UUID
    directory: Path
    manifest: Manifest
    header: Header
    layers: tuple[Path, ...]

    @property
    def state(self) -> Path:
        """The VMM's device state."""
        return self.directory / STATE

    @property
    def working_set(self) -> Path:
        """What the last resumes touched; see working_set.py."""
        return self.directory / WORKING_SET

    def wants_compaction(self, generations: int = COMPACT_AT) -> bool:
        """Whether its memory lies in so many generations (at least that many) that one build would be better."""
        return self.header.generation >= generations


def load(layout: Layout, snapshot_id: UUID) -> Snapshot:
    """Read and check a snapshot: all but the content of builds and layers.

    Raises SnapshotMissing, SnapshotDamaged, and StoreFailed when neither could be found out.
    """
    directory = layout.snapshot(snapshot_id)
    try:
        found = manifest.read(directory)
        header = _header(directory / HEADER, found)
        _check_state(directory / STATE, found.files[STATE])
        check_parts(layout, header, found)
    except SnapshotDamaged as err:
        if not directory.exists():  # perhaps removed while it was read
            raise SnapshotMissing(f"there is no snapshot {snapshot_id} in {layout.snapshots}") from err
        raise
    return Snapshot(snapshot_id, directory, found, header, tuple(layout.layer(layer) for layer in found.layers))


def digest(file: BinaryIO) -> FileRecord:
    """Size and SHA-256 of an open file, from where it stands."""
    hashed, size = hashlib.sha256(), 0
    while chunk := file.read(CHUNK_BYTES):
        hashed.update(chunk)
        size += len(chunk)
    return FileRecord(size=size, sha256=hashed.hexdigest())


def _header(path: Path, found: Manifest) -> Header:
    record = found.files[HEADER]
    try:
        with path.open("rb") as file:
            data = file.read(min(record.size, header_format.MAX_BYTES) + 1)
    except OSError as err:
        raise files.unreadable(err, "the memory header of a snapshot", HeaderDamaged) from err
    if FileRecord(len(data), hashlib.sha256(data).hexdigest()) != record:
        raise HeaderDamaged(f"{path} is not the file that was written: restore it or remove the snapshot")
    header = Header.decode(data, name=str(path))
    if header.memory_bytes != found.memory_mb << 20 or header.generation != found.generation:
        raise HeaderDamaged(f"{path} is of another memory than the manifest beside it")
    if found.builds != tuple(sorted(header.builds())):
        raise ManifestDamaged(f"{path.with_name(manifest.MANIFEST)} lists other builds than the header beside it")
    return header


def _check_state(path: Path, record: FileRecord) -> None:
    try:
        with path.open("rb") as file:
            same = os.fstat(file.fileno()).st_size == record.size and digest(file) == record
    except OSError as err:
        raise files.unreadable(err, "the device state of a snapshot", StateDamaged) from err
    if not same:
        raise StateDamaged(f"{path} is not the file that was written: restore it or remove the snapshot")


def check_parts(layout: Layout, header: Header, found: Manifest) -> None:
    """Raise DataDamaged or LayerMissing unless all builds and layers are there and long enough."""
    for build, needed in header.extents().items():
        directory = layout.build(build)
        try:
            size = (directory / DATA).stat().st_size
            (directory / SUMS).stat()
        except OSError as err:
            raise files.unreadable(err, "memory that a snapshot needs", DataDamaged) from err
        if size < needed:
            raise DataDamaged(f"{directory / DATA} is cut: {size} bytes instead of at least {needed}")
    for layer in found.layers:
        if not layout.layer(layer).is_file():
            raise LayerMissing(f"the disk layer {layout.layer(layer)} that a snapshot needs is not there")
