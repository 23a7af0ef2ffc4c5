"""Overlays as qcow2 files: for any file system and any kernel.

What is on the way of a pause or a resume (create, freeze) costs no process, see qcow2_writer and qcow2_image; what
makes one file of many is qcow2_merge, or qemu-img where the result is raw.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import trio

from agent.storage import files
from agent.storage.overlay import (
    HostDiskFull,
    OverlayBusy,
    OverlayDamaged,
    OverlayDriver,
    OverlayTooSmall,
    StorageError,
    StorageTimeout,
    StorageToolFailed,
)
from agent.storage.qcow2_image import opened
from agent.storage.qcow2_merge import merge
from agent.storage.qcow2_writer import Writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

BULK_TIMEOUT = 900.0
"""Seconds for a merge or a flattening; gigabytes at the speed of a slow disk."""

UNDO_TIMEOUT = 10.0

MAX_QUICK = 16
"""Files made or checked at once."""

MAX_BULK = 2
"""Merges and flattenings at once: they only queue for processors and disk, which sandboxes need."""

FAILURES = {
    "No space left on device": HostDiskFull,
    "Disk quota exceeded": HostDiskFull,
    'Failed to get "write" lock': OverlayBusy,
    'Failed to get shared "write" lock': OverlayBusy,
    "Image is not in qcow2 format": OverlayDamaged,
}
"""How qemu-img, which has one exit status for everything, says what happened."""

T = TypeVar("T")


class Qcow2Overlays(OverlayDriver):
    """See OverlayDriver."""

    disk_format = "qcow2"

    def __init__(self, tool: str = "qemu-img") -> None:
        self._tool = tool
        self._quick = trio.CapacityLimiter(MAX_QUICK)
        self._bulk = trio.CapacityLimiter(MAX_BULK)
        self._copies = trio.CapacityLimiter(MAX_BULK)

    async def create(self, base: Path, overlay: Path, size_mb: int, *, layers: Sequence[Path] = ()) -> None:
        """See OverlayDriver."""
        await self._in_thread(_create, base, overlay, size_mb, layers)

    async def freeze(self, overlay: Path, size_mb: int) -> None:
        """See OverlayDriver."""
        await self._in_thread(_freeze, overlay, size_mb)

    async def remove(self, overlay: Path) -> None:
        """See OverlayDriver."""
        await self._in_thread(partial(overlay.unlink, missing_ok=True))

    def usage(self, overlay: Path, layers: Sequence[Path] = ()) -> int:
        """See OverlayDriver."""
        return files.allocated_bytes(overlay, layers)

    async def merge(self, base: Path, layers: Sequence[Path], target: Path) -> None:
        """See OverlayDriver."""
        if not layers:
            raise ValueError("nothing to merge: a chain without layers is its base")
        base_bytes = await self._in_thread(files.base_size, base)
        async with self._finished("merging layers", target) as unfinished:
            copy = partial(_merge, (base, base_bytes), layers, unfinished)
            await trio.to_thread.run_sync(copy, limiter=self._copies)

    async def flatten(self, base: Path, overlay: Path, target: Path, *, layers: Sequence[Path] = ()) -> None:
        """See OverlayDriver."""
        await self._in_thread(files.base_size, base)
        await self._in_thread(_check, (*layers, overlay))
        async with self._finished("flattening an overlay", target) as unfinished:
            source = chain(base, (*layers, overlay))
            # Frozen or closed, no file of the chain changes between the check above and its use by the tool, whose
            # lock tells of a VM that we missed.
            await self._run("convert", "-O", "raw", source, str(unfinished))

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._quick)

    @asynccontextmanager
    async def _finished(self, doing: str, target: Path) -> AsyncIterator[Path]:
        """Give an empty file to fill, which takes the name `target` if that succeeds and is removed if not."""
        await self._in_thread(files.check_absent, target)
        unfinished = target.with_name(f".{target.name}.unfinished")
        async with self._bulk:
            await self.remove(unfinished)  # of an earlier attempt that was killed
            await self._in_thread(files.claim, unfinished)
            async with self._removed_on_failure(unfinished):
                with trio.move_on_after(BULK_TIMEOUT):
                    yield unfinished
                    await self._in_thread(files.publish, unfinished, target)
                    return
                raise StorageTimeout(f"{doing} into {target} took longer than {BULK_TIMEOUT:g} s")

    @asynccontextmanager
    async def _removed_on_failure(self, path: Path) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            with trio.move_on_after(UNDO_TIMEOUT, shield=True):
                await self.remove(path)
            raise

    async def _run(self, *arguments: str) -> None:
        """Run qemu-img. Cancelled, it is gone when this returns."""
        try:
            finished = await trio.run_process([self._tool, *arguments], capture_stderr=True, check=False)
        except FileNotFoundError as error:
            raise StorageToolFailed(f"{self._tool} is not installed; run: apt-get install qemu-utils") from error
        except OSError as error:
            raise files.failure(error) from error
        if finished.returncode != 0:
            raise _failure(arguments[0], finished.stderr.decode(errors="replace").strip())


def chain(base: Path, overlays: Sequence[Path]) -> str:
    """Return what qemu-img takes for the image on top of `overlays`, bottom to top, over the raw image `base`.

    With every file and format given, QEMU follows no name in a header and guesses no format from a content.
    """
    node: dict[str, object] = {"driver": "raw", "file": {"driver": "file", "filename": str(base)}}
    for overlay in overlays:
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(overlay)}, "backing": node}
    return "json:" + msgspec.json.encode(node).decode()


def _create(base: Path, overlay: Path, size_mb: int, layers: Sequence[Path]) -> None:
    files.check_base(base, size_mb)
    files.check_present(layers)
    below = (str(base), "raw")
    if layers:
        with opened(layers[-1]) as layer:
            layer_bytes = layer.header.disk_bytes
        if size_mb << 20 < layer_bytes:
            raise OverlayTooSmall(f"a disk of {size_mb} MiB is too small for its layer {layers[-1]}")
        below = (str(layers[-1]), "qcow2")
    with files.claimed(overlay) as descriptor:
        Writer(descriptor, size_mb << 20).finish(below)


def _freeze(overlay: Path, size_mb: int) -> None:
    with opened(overlay) as image:
        if image.header.disk_bytes != size_mb << 20:
            raise OverlayDamaged(f"{overlay} is no disk of {size_mb} MiB but of {image.header.disk_bytes} bytes")
        image.check_whole()
        try:
            os.fsync(image.descriptor)
        except OSError as error:
            raise files.failure(error) from error


def _check(overlays: Sequence[Path]) -> None:
    for overlay in overlays:
        with opened(overlay) as image:
            image.check_whole()


def _merge(base: tuple[Path, int], layers: Sequence[Path], target: Path) -> None:
    try:
        with target.open("r+b", buffering=0) as file:
            merge(base, layers, file.fileno(), trio.from_thread.check_cancelled)
    except OSError as error:
        raise files.failure(error) from error


def _failure(command: str, message: str) -> StorageError:
    for words, kind in FAILURES.items():
        if words in message:
            return kind(f"qemu-img {command}: {message}")
    return StorageToolFailed(f"qemu-img {command}: {message}")
