"""What the agent asks of a disk overlay: the interface every driver keeps and its failures.

An overlay holds what one sandbox has written; the base image below it is shared, read-only and never changes (its
name is derived from its content). Bringing an overlay back from a snapshot joins the interface with the snapshots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

# ruff: noqa: N818 - the names say what happened; "Error" would only make them longer


class StorageError(Exception):
    """Base of everything a storage driver raises; never raised itself."""


class BaseMissing(StorageError):
    """The base image is not there."""


class OverlayExists(StorageError):
    """Something with the overlay's (or target's) name is there already; it was not touched."""


class OverlayMissing(StorageError):
    """There is no such overlay."""


class OverlayTooSmall(StorageError):
    """The disk asked for is smaller than the base image below it."""


class OverlayDamaged(StorageError):
    """The file is no overlay of that base image."""


class OverlayBusy(StorageError):
    """A VM has the overlay open."""


class HostDiskFull(StorageError):
    """The host's disk is full; nothing half-written is left."""


class StorageTimeout(StorageError):
    """The host's disk did not keep up; nothing half-written is left."""


class StorageToolFailed(StorageError):
    """The tool failed for another reason; the message has its own words."""


class OverlayDriver(Protocol):
    """Creates and removes overlays. Paths are absolute. Cancelled, a call leaves nothing half-made."""

    @property
    def disk_format(self) -> str:
        """What a VMM must read the overlay as."""
        ...

    async def create(self, base: Path, overlay: Path, size_mb: int) -> None:
        """Make an empty overlay of `base`, a disk of `size_mb` MiB to its guest.

        Raises BaseMissing, OverlayExists, OverlayTooSmall, HostDiskFull, StorageTimeout, StorageToolFailed.
        """
        ...

    async def remove(self, overlay: Path) -> None:
        """Remove an overlay; harmless if there is none."""
        ...

    def usage(self, overlay: Path) -> int:
        """Return the bytes the overlay takes on the host: allocated blocks, not its apparent size.

        Raises OverlayMissing.
        """
        ...

    async def flatten(self, base: Path, overlay: Path, target: Path) -> None:
        """Write base and overlay together as one raw, sparse image. `target` appears complete and on disk, or not.

        No VM may have the overlay open. Raises OverlayMissing, OverlayBusy, OverlayDamaged, OverlayExists,
        BaseMissing, HostDiskFull, StorageTimeout, StorageToolFailed.
        """
        ...
