"""The file operations that every overlay driver shares. All but `allocated_bytes` block: call them from a thread."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agent.storage.overlay import (
    BaseMissing,
    HostDiskFull,
    OverlayExists,
    OverlayMissing,
    OverlayTooSmall,
    StorageError,
    StorageToolFailed,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

SECTOR_BYTES = 512
"""The unit of st_blocks, whatever the file system's own."""


def allocated_bytes(overlay: Path, layers: Sequence[Path] = ()) -> int:
    """Return what the files take on the disk together. Raises OverlayMissing."""
    return sum(_allocated_bytes(path) for path in (*layers, overlay))


def check_present(paths: Iterable[Path]) -> None:
    """Raises OverlayMissing, naming the first that is not there."""
    for path in paths:
        if not path.exists():
            raise OverlayMissing(f"there is no overlay {path}")


def check_absent(target: Path) -> None:
    """Raises OverlayExists."""
    if target.exists():
        raise OverlayExists(f"{target} exists already")


def claim(path: Path) -> None:
    """Create the file, empty, so that nobody else can; the tools themselves would overwrite. Raises OverlayExists."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError as error:
        raise OverlayExists(f"{path} exists already") from error
    except OSError as error:
        raise failure(error) from error


@contextmanager
def claimed(path: Path) -> Iterator[int]:
    """Claim, and give a descriptor to write with; a failure removes the file. Raises also what `failure` makes."""
    claim(path)
    try:
        with path.open("r+b", buffering=0) as file:
            yield file.fileno()
    except OSError as error:
        path.unlink(missing_ok=True)
        raise failure(error) from error
    except Exception:
        path.unlink(missing_ok=True)
        raise


def base_size(base: Path) -> int:
    """Return the size of a raw base image in bytes. Raises BaseMissing."""
    if not base.is_absolute():
        raise ValueError(f"an overlay records its base by name, which must be absolute: {base}")
    try:
        return base.stat().st_size
    except FileNotFoundError as error:
        raise BaseMissing(f"the base image {base} is missing") from error


def check_base(base: Path, size_mb: int) -> None:
    """Check that a raw base image is there and fits a disk of that size. Raises BaseMissing, OverlayTooSmall."""
    base_bytes = base_size(base)
    if size_mb << 20 < base_bytes:
        smallest = -(-base_bytes // (1 << 20))
        raise OverlayTooSmall(f"a disk of {size_mb} MiB is too small for this image; it needs {smallest} MiB")


def publish(partial: Path, target: Path) -> None:
    """Give a finished file its name, durably: content first, then the name. Raises HostDiskFull, StorageToolFailed."""
    try:
        _publish(partial, target)
    except OSError as error:
        raise failure(error) from error


def failure(error: OSError) -> StorageError:
    """Translate what the host's file system said."""
    kind = HostDiskFull if error.errno in {errno.ENOSPC, errno.EDQUOT} else StorageToolFailed
    return kind(str(error))


def _allocated_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * SECTOR_BYTES
    except FileNotFoundError as error:
        raise OverlayMissing(f"there is no overlay {path}") from error


def _publish(partial: Path, target: Path) -> None:
    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.replace(target)
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
