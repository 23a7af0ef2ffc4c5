"""Making a snapshot: everything in its place and on the disk, the manifest last, then one rename."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID, uuid4

import structlog

from agent.snapshots import files, loading, manifest
from agent.snapshots.blocks import BuildWriter
from agent.snapshots.errors import SnapshotExists
from agent.snapshots.header import Header
from agent.snapshots.holds import Holds
from agent.snapshots.layout import WORKING_SET, Layout, remove_tree, set_aside
from agent.snapshots.loading import Snapshot
from agent.snapshots.manifest import HEADER, STATE, Description, FileRecord, Manifest

log = structlog.get_logger()


class Draft:
    """A snapshot that nobody can see yet. Made by SnapshotStore.draft; closed without `publish`, nothing of it is left.

    Blocks on the disk: call it from threads, one at a time. Raises HostDiskFull, StoreFailed.
    """

    def __init__(self, layout: Layout, holds: Holds, snapshot_id: UUID) -> None:
        self.id = snapshot_id
        self.directory = layout.partial(snapshot_id)
        self._layout = layout
        self._holds = holds
        self._hold = holds.begin(snapshot_id)
        self._header: Header | None = None
        self._writers: list[BuildWriter] = []
        self._builds: list[UUID] = []
        self._layers: dict[UUID, os.stat_result] = {}
        self._renamed = False
        self._published = False
        self._closed = False
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    @property
    def state_path(self) -> Path:
        """Where the VMM's device state is to be written."""
        return self.directory / STATE

    @property
    def working_set(self) -> Path:
        """Where a working set may be written."""
        return self.directory / WORKING_SET

    def new_build(self) -> BuildWriter:
        """Begin a memory build of this snapshot; `publish` finishes it."""
        build = uuid4()
        with self._holds.lock:
            self._hold.builds.add(build)
        self._builds.append(build)
        writer = BuildWriter(self._layout.build(build))
        self._writers.append(writer)
        return writer

    def add_layer(self, file: Path) -> UUID:
        """Make a disk image, to which nobody writes any more, a layer: root's, read-only, and on the disk.

        It keeps the name it has. Closed without `publish`, the file is again as it was.
        """
        layer = uuid4()
        target = self._layout.layer(layer)
        with files.reported(f"making {file} a layer"):
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                before = os.fstat(descriptor)
                if not stat.S_ISREG(before.st_mode):
                    raise ValueError(f"{file} is no regular file")
                with self._holds.lock:
                    self._hold.layers.add(layer)
                self._layers[layer] = before
                files.link(file, target)
                if not os.path.samestat(before, target.lstat()):
                    raise ValueError(f"{file} was replaced while it was made a layer")
                _take_over(descriptor)
            finally:
                os.close(descriptor)
        return layer

    def hold(self, builds: Iterable[UUID], layers: Iterable[UUID]) -> None:
        """Keep builds and layers that exist from being collected until the draft is closed."""
        with self._holds.lock:
            self._hold.builds.update(builds)
            self._hold.layers.update(layers)

    def write_header(self, header: Header) -> None:
        """Write the memory's map."""
        self.hold(header.builds(), ())
        self._write(HEADER, header.encode())
        self._header = header

    def link_state(self, source: Snapshot) -> None:
        """Take over the device state and the working set of another snapshot."""
        with files.reported(f"copying from {source.directory}"):
            files.link(source.state, self.state_path)
            with suppress(FileNotFoundError):  # advice; there may be none
                files.link(source.working_set, self.working_set)

    def publish(self, description: Description, layers: Sequence[UUID]) -> Snapshot:
        """Put everything on the disk and give the snapshot its name. `layers`: bottom to top, old and new ones.

        Raises HostDiskFull and StoreFailed, and DataDamaged or LayerMissing for a part that is not there.
        """
        if self._closed:
            raise ValueError(f"the draft of {self.id} is closed")
        if self._header is None or self._header.memory_bytes != description.memory_mb << 20:
            raise ValueError("a snapshot needs the header of a memory of its size")
        self.hold((), layers)
        header = self._header
        with files.reported(f"writing {self.directory}"):
            self._finish_builds(header)
            if self._layers:
                files.sync_directory(self._layout.layers)
            found = self._manifest(description, tuple(layers), header)
            self._write(manifest.MANIFEST, found.encode())
            files.sync_directory(self.directory)
            self._rename(header, found)
            files.sync_directory(self._layout.snapshots)
        self._published = True
        self.close()
        paths = tuple(self._layout.layer(layer) for layer in layers)
        return Snapshot(self.id, self._layout.snapshot(self.id), found, header, paths)

    def close(self) -> None:
        """End it: what was made is removed, unless it is published. Harmless when done already."""
        if self._closed:
            return
        self._closed = True
        try:
            for writer in self._writers:
                writer.close()
            if not self._published:
                self._undo()
        except OSError as err:
            log.warning("snapshot_draft_not_removed", snapshot_id=str(self.id), error=str(err))  # collect() will
        finally:
            self._holds.end(self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _err: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> None:
        with files.reported(f"making {self.directory}"):
            if self._layout.snapshot(self.id).exists():
                raise SnapshotExists(f"there is a snapshot {self.id} already")
            remove_tree(self.directory)  # of an earlier attempt that could not be removed
            files.make_directory(self.directory)

    def _write(self, name: str, content: bytes) -> None:
        with files.reported(f"writing {self.directory / name}"):
            descriptor = files.create(self.directory / name)
            try:
                files.write_all(descriptor, memoryview(content))
                files.seal(descriptor)
            finally:
                os.close(descriptor)

    def _finish_builds(self, header: Header) -> None:
        for writer in self._writers:
            writer.finish()
            if writer.build not in header.builds():  # nothing had changed
                remove_tree(writer.directory)
        if self._writers:
            files.sync_directory(self._layout.builds)

    def _manifest(self, description: Description, layers: tuple[UUID, ...], header: Header) -> Manifest:
        return Manifest(
            **{name: getattr(description, name) for name in Description.__struct_fields__},
            id=self.id,
            created_at=datetime.now(UTC),
            generation=header.generation,
            builds=tuple(sorted(header.builds())),
            layers=layers,
            files={HEADER: self._digest(HEADER), STATE: self._digest(STATE)},
        )

    def _digest(self, name: str) -> FileRecord:
        """Put a file on the disk, take it away from whoever wrote it, and say what it is."""
        with (self.directory / name).open("rb") as file:
            _take_over(file.fileno())
            return loading.digest(file)

    def _rename(self, header: Header, found: Manifest) -> None:
        with self._holds.lock:  # nothing that is there now is collected before the manifest can be seen
            loading.check_parts(self._layout, header, found)
            files.rename(self.directory, self._layout.snapshot(self.id))
            self._renamed = True

    def _undo(self) -> None:
        if self._renamed:
            rubbish = set_aside(self._layout.snapshot(self.id))
            files.sync_directory(self._layout.snapshots)
            remove_tree(rubbish)
        remove_tree(self.directory)
        for build in self._builds:
            remove_tree(self._layout.build(build))
        for layer, before in self._layers.items():
            self._undo_layer(layer, before)

    def _undo_layer(self, layer: UUID, before: os.stat_result) -> None:
        path = self._layout.layer(layer)
        with self._holds.lock:
            if layer in self._holds.pinned() or not path.exists():
                return
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                files.set_mode(descriptor, stat.S_IMODE(before.st_mode))
                files.set_owner(descriptor, before.st_uid, before.st_gid)
            finally:
                os.close(descriptor)
            files.unlink(path)


def _take_over(descriptor: int) -> None:
    """Make an open file ours, read-only and durable. What is so already costs no write."""
    found = os.fstat(descriptor)
    if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
        files.set_owner(descriptor, os.geteuid(), os.getegid())
    if stat.S_IMODE(found.st_mode) != files.SEALED_MODE:
        files.set_mode(descriptor, files.SEALED_MODE)
    files.sync(descriptor)
