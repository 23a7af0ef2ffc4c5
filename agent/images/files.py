"""Writing what must survive a crash whole: temporary directories, fsync, rename; one builder at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agent.images.commands import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TEMPORARY = ".tmp-"
LOCK = ".lock"
BLOCK = 64 * 1024
ZEROS = bytes(BLOCK)
REMOVE_SECONDS = 300


@contextmanager
def exclusive(store: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the store's lock; `on_wait` is called once if somebody else holds it. The kernel frees it when we die."""
    store.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(store / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def temporary_directory(store: Path) -> Iterator[Path]:
    """A new directory in the store, removed at the end if it was not renamed away. Only under the store's lock."""
    path = store / f"{TEMPORARY}{secrets.token_hex(8)}"
    path.mkdir(mode=0o755)
    try:
        yield path
    finally:
        remove(path)


def remove_leftovers(store: Path) -> None:
    """Remove what interrupted builds left. Only under the store's lock, which says that none is running."""
    for path in store.glob(f"{TEMPORARY}*"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a tree, without ever crossing into another file system that somebody mounted in it."""
    if path.exists() or path.is_symlink():
        run(["rm", "-rf", "--one-file-system", "--", str(path)], seconds=REMOVE_SECONDS)


def discard(store: Path, path: Path) -> None:
    """Make `path` vanish at once, then remove it; dying in between leaves a temporary directory."""
    aside = store / f"{TEMPORARY}{secrets.token_hex(8)}"
    path.rename(aside)
    remove(aside)


def publish(path: Path, to: Path) -> None:
    """Move the finished directory `path` to `to`, which must not exist; all of it is on the disk before it is seen."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
    sync(to.parent)


def point(store: Path, link: Path, target: str) -> None:
    """Make the symbolic link `link` in the store point to `target`, in one step for whoever reads it."""
    new = store / f"{TEMPORARY}{secrets.token_hex(8)}"
    new.symlink_to(target)
    new.replace(link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Have a file or a directory on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str:
    """SHA-256 over the size and every 64 KiB block that is not all zeros, with its place.

    So holes cost nothing, and a copy of the file that has other holes has the same digest.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "big"))
        at = 0
        while (at := _next_data(file.fileno(), at, size)) < size:
            at -= at % BLOCK
            block = os.pread(file.fileno(), BLOCK, at)
            if block != ZEROS[: len(block)]:
                digest.update(at.to_bytes(8, "big") + block)
            at += BLOCK
    return digest.hexdigest()


def _next_data(descriptor: int, at: int, size: int) -> int:
    if at >= size:
        return size
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError:  # ENXIO: only a hole follows
        return size


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link: parts are shared by all images made of them. A copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
