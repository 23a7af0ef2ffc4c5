"""Overlays without qemu-img: small files with the same rules, for tests of what is around them.

They are real files, so that what a test crashes half way finds them again, as it would find real ones.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
import trio

from agent.storage import files
from agent.storage.overlay import OverlayDamaged, OverlayDriver, OverlayExists, OverlayMissing, StorageError

if TYPE_CHECKING:
    from pathlib import Path


BLOCK_BYTES = 4096


class FakeContent(msgspec.Struct, frozen=True):
    """What an overlay file of ours holds."""

    base: str
    size_mb: int


class FakeOverlays(OverlayDriver):
    """See OverlayDriver."""

    disk_format = "qcow2"

    def __init__(self) -> None:
        self._failure: StorageError | None = None

    def fail_next(self, failure: StorageError) -> None:
        """Make the next `create` or `flatten` raise this."""
        self._failure = failure

    async def create(self, base: Path, overlay: Path, size_mb: int) -> None:
        """See OverlayDriver."""
        # No threads anywhere here: a fake clock does not wait for them.
        await trio.lowlevel.checkpoint()
        self._create(base, overlay, size_mb)

    async def remove(self, overlay: Path) -> None:
        """See OverlayDriver."""
        await trio.lowlevel.checkpoint()
        _unlink(overlay)

    def usage(self, overlay: Path) -> int:
        """See OverlayDriver."""
        return files.allocated_bytes(overlay)

    async def flatten(self, base: Path, overlay: Path, target: Path) -> None:
        """See OverlayDriver."""
        await trio.lowlevel.checkpoint()
        self._flatten(base, overlay, target)

    def _create(self, base: Path, overlay: Path, size_mb: int) -> None:
        self._fail()
        files.check_base(base, size_mb)
        files.claim(overlay)
        overlay.write_bytes(msgspec.json.encode(FakeContent(str(base), size_mb)))

    def _flatten(self, base: Path, overlay: Path, target: Path) -> None:
        self._fail()
        if not overlay.exists():
            raise OverlayMissing(f"there is no overlay {overlay}")
        try:
            content = msgspec.json.decode(overlay.read_bytes(), type=FakeContent)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise OverlayDamaged(f"{overlay} is not an overlay of {base}") from error
        if content.base != str(base):
            raise OverlayDamaged(f"{overlay} is not an overlay of {base}")
        files.base_size(base)
        if target.exists():
            raise OverlayExists(f"{target} exists already")
        _copy_sparse(base, target, content.size_mb << 20)

    def _fail(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _copy_sparse(source: Path, target: Path, size: int) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(BLOCK_BYTES):
            if any(chunk):
                writer.write(chunk)
            else:
                writer.seek(len(chunk), os.SEEK_CUR)
        writer.truncate(size)
