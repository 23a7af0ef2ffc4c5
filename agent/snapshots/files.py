"""Every operation by which the store changes the disk, one system call or nearly so each.

All of the package goes through here, so that tests can fail or stop it between any two of them. They raise OSError;
`reported` turns that into this package's errors.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.snapshots.errors import HostDiskFull, SnapshotDamaged, SnapshotError, StoreFailed

DIRECTORY_MODE = 0o711
"""Others reach what they know the name of, and can list nothing."""

SEALED_MODE = 0o400

ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
"""The errors that say that a file is not there. Others may pass, and say nothing about the snapshot: descriptors or
memory are short, the disk has a hiccup."""


def make_directory(path: Path) -> None:
    """Make a directory that must not exist."""
    path.mkdir()
    path.chmod(DIRECTORY_MODE)  # whatever our umask is


def provide_directory(path: Path) -> None:
    """Make a directory unless it is there, with the directories above it."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(DIRECTORY_MODE)  # whatever our umask is


def create(path: Path) -> int:
    """Open a new file for writing, and for its owner alone."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)


def write(descriptor: int, data: bytes | memoryview) -> int:
    """Write some of `data`; returns how many bytes it took."""
    return os.write(descriptor, data)


def sync(descriptor: int) -> None:
    """Wait until a file is on the disk."""
    os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_owner(descriptor: int, uid: int, gid: int) -> None:
    """Change whose an open file is."""
    os.fchown(descriptor, uid, gid)


def set_mode(descriptor: int, mode: int) -> None:
    """Change what may be done with an open file or directory."""
    os.fchmod(descriptor, mode)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, which must not exist."""
    os.link(source, target, follow_symlinks=False)


def rename(source: Path, target: Path) -> None:
    """Rename a file or directory; a file's target is replaced."""
    source.rename(target)


def unlink(path: Path) -> None:
    """Remove a name of a file; harmless when it is gone."""
    path.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    """Remove an empty directory; harmless when it is gone."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data`."""
    while data:
        data = data[write(descriptor, data) :]


def seal(descriptor: int) -> None:
    """Make an open file read-only and wait until it is on the disk."""
    set_mode(descriptor, SEALED_MODE)
    sync(descriptor)


@contextmanager
def reported(doing: str) -> Iterator[None]:
    """Raise HostDiskFull or StoreFailed for what the operating system says while `doing` something."""
    try:
        yield
    except OSError as err:
        if err.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise HostDiskFull(f"the disk is full while {doing}: free some space and try again ({err})") from err
        raise StoreFailed(f"{doing}: {err}") from err


def unreadable(err: OSError, what: str, damage: type[SnapshotDamaged]) -> SnapshotError:
    """What it means that `what` cannot be read: damage if it is not there, else StoreFailed, and to be tried again."""
    kind = damage if err.errno in ABSENT else StoreFailed
    return kind(f"{what} cannot be read: {err}")
