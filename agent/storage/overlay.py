"""What the agent asks of a disk overlay: the interface every driver keeps and its failures.

An overlay holds what one sandbox has written; the base image below it is shared, read-only and never changes (its
name is derived from its content). A pause freezes the overlay: the file becomes a *layer*, immutable and shared by any
number of chains, and the next overlay is made on top of it. A chain is always told in full, base and layers bottom to
top, by whoever keeps the records: what a file says about the files below it was written by a VMM that its guest may
have taken over, and is never believed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# ruff: noqa: N818 - the names say what happened; "Error" would only make them longer


class StorageError(Exception):
    """Base of everything a storage driver raises; never raised itself."""


class BaseMissing(StorageError):
    """The base image is not there."""


class OverlayExists(StorageError):
    """Something with the overlay's (or target's) name is there already; it was not touched."""


class OverlayMissing(StorageError):
    """There is no such overlay or layer."""


class OverlayTooSmall(StorageError):
    """The disk asked for is smaller than the base image or the layers below it."""


class OverlayDamaged(StorageError):
    """The file is not an overlay as we make them; the message names it and says what is wrong."""


class OverlayBusy(StorageError):
    """A VM has the overlay open for writing."""


class HostDiskFull(StorageError):
    """The host's disk is full; nothing half-written is left."""


class StorageTimeout(StorageError):
    """The host's disk did not keep up; nothing half-written is left."""


class StorageToolFailed(StorageError):
    """The tool failed for another reason; the message has its own words."""


class OverlayDriver(Protocol):
    """Creates and removes overlays. Paths are absolute. Cancelled, a call leaves nothing half-made.

    `layers` are the frozen overlays between the base and the overlay, bottom to top; no call changes one.
    """

    @property
    def disk_format(self) -> str:
        """What a VMM must read the overlay as."""
        ...

    async def create(self, base: Path, overlay: Path, size_mb: int, *, layers: Sequence[Path] = ()) -> None:
        """Make an empty overlay of `base` and `layers`, a disk of `size_mb` MiB to its guest.

        Raises BaseMissing, OverlayExists, OverlayMissing (a layer), OverlayDamaged (the top layer), OverlayTooSmall,
        HostDiskFull, StorageTimeout, StorageToolFailed.
        """
        ...

    async def freeze(self, overlay: Path, size_mb: int) -> None:
        """Check that an overlay is fit to be a layer, a disk of `size_mb` MiB, and bring it to the disk.

        A VMM may still have it open, if its VM stands still and its caches were flushed (QEMU does that as it stops
        one); whoever links the file into a chain sees to it that nothing writes to it again. Raises OverlayMissing,
        OverlayDamaged, HostDiskFull, StorageTimeout, StorageToolFailed.
        """
        ...

    async def merge(self, base: Path, layers: Sequence[Path], target: Path) -> None:
        """Write one layer with the content of `layers` together, over the same base. It appears complete, or not.

        Costs about the blocks that any of the layers holds: what none of them holds is left to the base, what the
        uppermost zeroed stays zero. VMs may read the layers meanwhile. Raises OverlayMissing, OverlayBusy,
        OverlayDamaged, OverlayExists, BaseMissing, HostDiskFull, StorageTimeout, StorageToolFailed.
        """
        ...

    async def remove(self, overlay: Path) -> None:
        """Remove an overlay; harmless if there is none."""
        ...

    def usage(self, overlay: Path, layers: Sequence[Path] = ()) -> int:
        """Return the bytes the overlay and the layers take on the host: allocated blocks, not their apparent size.

        Raises OverlayMissing.
        """
        ...

    async def flatten(self, base: Path, overlay: Path, target: Path, *, layers: Sequence[Path] = ()) -> None:
        """Write base, layers and overlay as one raw, sparse image. `target` appears complete and on disk, or not.

        No VM may have the overlay open. Raises OverlayMissing, OverlayBusy, OverlayDamaged, OverlayExists,
        BaseMissing, HostDiskFull, StorageTimeout, StorageToolFailed.
        """
        ...
