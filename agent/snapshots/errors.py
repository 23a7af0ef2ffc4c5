"""What can go wrong with snapshots: a leaf per cause. Messages name the file at fault and say what to do."""

# ruff: noqa: N818 - the names say what happened; "Error" would only make them longer.

from __future__ import annotations


class SnapshotError(Exception):
    """Base of this package's errors; never raised itself."""


class SnapshotMissing(SnapshotError):
    """There is no snapshot with that id."""


class SnapshotExists(SnapshotError):
    """A snapshot with that id is there already, or is being made; it was not touched."""


class SnapshotDamaged(SnapshotError):
    """Base of everything that keeps a snapshot that is there from being used; never raised itself.

    Whoever gets one starts nothing and deletes nothing: the files stay for inspection.
    """


class ManifestDamaged(SnapshotDamaged):
    """`manifest.json` is missing, cut, changed or of another version."""


class HeaderDamaged(SnapshotDamaged):
    """`mem.header` is missing, cut, changed, inconsistent or of another version."""


class StateDamaged(SnapshotDamaged):
    """`vm.state` is missing or not what was written."""


class DataDamaged(SnapshotDamaged):
    """The data of a memory build, or its checksums, are missing, cut, unreadable or changed."""


class LayerMissing(SnapshotDamaged):
    """A disk layer that the snapshot needs is not there."""


class HostDiskFull(SnapshotError):
    """The host's disk (or its quota) is full; nothing half-written is left."""


class StoreFailed(SnapshotError):
    """The host's file system said something else; the message has its words."""


class CompactionStopped(SnapshotError):
    """The caller asked a compaction to stop; nothing of it is left and the snapshot is as it was."""


class MemoryTooFragmented(SnapshotError):
    """The memory would need more runs than a header may have (`header.MAX_RUNS`)."""


class WouldBlock(Exception):
    """A read that may not wait would have to wait for the disk. No failure: read again where waiting is allowed."""
