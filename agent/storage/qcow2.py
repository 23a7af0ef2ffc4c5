"""Overlays as qcow2 files, made by qemu-img: for any file system and any kernel."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from agent.storage import files
from agent.storage.overlay import (
    HostDiskFull,
    OverlayBusy,
    OverlayDamaged,
    OverlayDriver,
    OverlayExists,
    OverlayMissing,
    StorageError,
    StorageTimeout,
    StorageToolFailed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

CREATE_TIMEOUT = 30.0
"""Seconds; it writes 200 kB, usually within 10 ms."""

FLATTEN_TIMEOUT = 900.0
"""Seconds; gigabytes at the speed of a slow disk."""

UNDO_TIMEOUT = 10.0

MAX_PROCESSES = 4
"""qemu-img processes at once: they only queue for processors and disk."""

FAILURES = {
    "No space left on device": HostDiskFull,
    "Disk quota exceeded": HostDiskFull,
    'Failed to get "write" lock': OverlayBusy,
    'Failed to get shared "write" lock': OverlayBusy,
    "Image is not in qcow2 format": OverlayDamaged,
}
"""How qemu-img, which has one exit status for everything, says what happened."""


class Qcow2Overlays(OverlayDriver):
    """See OverlayDriver."""

    disk_format = "qcow2"

    def __init__(self, tool: str = "qemu-img") -> None:
        self._tool = tool
        self._processes = trio.CapacityLimiter(MAX_PROCESSES)

    async def create(self, base: Path, overlay: Path, size_mb: int, *, layers: Sequence[Path] = ()) -> None:
        """See OverlayDriver."""
        if layers:
            raise NotImplementedError
        await trio.to_thread.run_sync(files.check_base, base, size_mb)
        await trio.to_thread.run_sync(files.claim, overlay)
        async with _removed_on_failure(overlay):
            # Without -F qemu-img would guess the format of the base from its content, which users may have written.
            backing = ("-F", "raw", "-b", str(base))
            await self._run(
                "create", "-q", "-f", "qcow2", *backing, str(overlay), f"{size_mb}M", seconds=CREATE_TIMEOUT
            )

    async def remove(self, overlay: Path) -> None:
        """See OverlayDriver."""
        await trio.to_thread.run_sync(partial(overlay.unlink, missing_ok=True))

    def usage(self, overlay: Path, layers: Sequence[Path] = ()) -> int:
        """See OverlayDriver."""
        return files.allocated_bytes(overlay, layers)

    async def freeze(self, overlay: Path, size_mb: int) -> None:
        """See OverlayDriver."""
        raise NotImplementedError

    async def merge(self, base: Path, layers: Sequence[Path], target: Path) -> None:
        """See OverlayDriver."""
        raise NotImplementedError

    async def flatten(self, base: Path, overlay: Path, target: Path, *, layers: Sequence[Path] = ()) -> None:
        """See OverlayDriver."""
        if layers:
            raise NotImplementedError
        await trio.to_thread.run_sync(files.base_size, base)
        await self._check_overlay(base, overlay)
        if await trio.to_thread.run_sync(target.exists):
            raise OverlayExists(f"{target} exists already")
        unfinished = target.with_name(f".{target.name}.unfinished")
        await self.remove(unfinished)  # of an earlier attempt that was killed
        await trio.to_thread.run_sync(files.claim, unfinished)
        async with _removed_on_failure(unfinished):
            formats = ("-f", "qcow2", "-O", "raw")
            await self._run("convert", *formats, str(overlay), str(unfinished), seconds=FLATTEN_TIMEOUT)
            await trio.to_thread.run_sync(files.publish, unfinished, target)

    async def _check_overlay(self, base: Path, overlay: Path) -> None:
        """Make sure that the file names no other file than its base.

        A VMM that a guest has taken over can write any name into its overlay, and we read as root.
        """
        if not await trio.to_thread.run_sync(overlay.exists):
            raise OverlayMissing(f"there is no overlay {overlay}")
        output = await self._run("info", "--output=json", "-f", "qcow2", str(overlay), seconds=CREATE_TIMEOUT)
        information: dict[str, Any] = msgspec.json.decode(output)
        details = information.get("format-specific", {}).get("data", {})
        if information.get("backing-filename") != str(base) or "data-file" in details:
            raise OverlayDamaged(f"{overlay} is not an overlay of {base}")

    async def _run(self, *arguments: str, seconds: float) -> bytes:
        """Run qemu-img and return its output. Cancelled or out of time, it is gone when this returns."""
        async with self._processes:
            with trio.move_on_after(seconds):
                return await self._finish(arguments)
        raise StorageTimeout(f"qemu-img {arguments[0]} took longer than {seconds:g} s")

    async def _finish(self, arguments: Sequence[str]) -> bytes:
        command = [self._tool, *arguments]
        try:
            finished = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        except FileNotFoundError as error:
            raise StorageToolFailed(f"{self._tool} is not installed; run: apt-get install qemu-utils") from error
        except OSError as error:
            raise files.failure(error) from error
        if finished.returncode != 0:
            raise _failure(arguments[0], finished.stderr.decode(errors="replace").strip())
        return finished.stdout


def _failure(command: str, message: str) -> StorageError:
    for words, kind in FAILURES.items():
        if words in message:
            return kind(f"qemu-img {command}: {message}")
    return StorageToolFailed(f"qemu-img {command}: {message}")


@asynccontextmanager
async def _removed_on_failure(path: Path) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        with trio.move_on_after(UNDO_TIMEOUT, shield=True):
            await trio.to_thread.run_sync(partial(path.unlink, missing_ok=True))
        raise
