"""Overlays without qcow2: small files with the same rules, for tests of what is around them.

They are real files, so that what a test crashes half way finds them again, as it would find real ones.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
import trio

from agent.storage import files
from agent.storage.overlay import OverlayDamaged, OverlayDriver, OverlayTooSmall, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


BLOCK_BYTES = 65536
"""What `put` writes at once: the cluster of a real overlay."""


class FakeContent(msgspec.Struct, frozen=True):
    """What an overlay file of ours holds. `blocks`: number of a block -> the byte that fills it."""

    size_mb: int
    blocks: dict[int, int] = {}


class FakeOverlays(OverlayDriver):
    """See OverlayDriver."""

    disk_format = "qcow2"

    def __init__(self) -> None:
        self._failure: StorageError | None = None

    def fail_next(self, failure: StorageError) -> None:
        """Make the next `create`, `freeze`, `merge` or `flatten` raise this."""
        self._failure = failure

    def put(self, overlay: Path, block: int, value: int) -> None:
        """Do what a guest does: fill a block of BLOCK_BYTES with one byte value."""
        content = _content(overlay)
        _write(overlay, FakeContent(content.size_mb, {**content.blocks, block: value}))

    # No threads anywhere here: a fake clock does not wait for them.

    async def create(self, base: Path, overlay: Path, size_mb: int, *, layers: Sequence[Path] = ()) -> None:
        """See OverlayDriver."""
        await trio.lowlevel.checkpoint()
        self._create(base, overlay, size_mb, layers)

    async def freeze(self, overlay: Path, size_mb: int) -> None:
        """See OverlayDriver."""
        await trio.lowlevel.checkpoint()
        self._freeze(overlay, size_mb)

    async def merge(self, base: Path, layers: Sequence[Path], target: Path) -> None:
        """See OverlayDriver."""
        await trio.lowlevel.checkpoint()
        self._merge(base, layers, target)

    async def remove(self, overlay: Path) -> None:
        """See OverlayDriver."""
        await trio.lowlevel.checkpoint()
        _unlink(overlay)

    def usage(self, overlay: Path, layers: Sequence[Path] = ()) -> int:
        """See OverlayDriver."""
        return files.allocated_bytes(overlay, layers)

    async def flatten(self, base: Path, overlay: Path, target: Path, *, layers: Sequence[Path] = ()) -> None:
        """See OverlayDriver."""
        await trio.lowlevel.checkpoint()
        self._flatten(base, [*layers, overlay], target)

    def _create(self, base: Path, overlay: Path, size_mb: int, layers: Sequence[Path]) -> None:
        self._fail()
        files.check_base(base, size_mb)
        files.check_present(layers)
        if layers and size_mb < _content(layers[-1]).size_mb:
            raise OverlayTooSmall(f"a disk of {size_mb} MiB is too small for its layer {layers[-1]}")
        files.claim(overlay)
        _write(overlay, FakeContent(size_mb))

    def _freeze(self, overlay: Path, size_mb: int) -> None:
        self._fail()
        files.check_present([overlay])
        if _content(overlay).size_mb != size_mb:
            raise OverlayDamaged(f"{overlay} is no disk of {size_mb} MiB")

    def _merge(self, base: Path, layers: Sequence[Path], target: Path) -> None:
        self._fail()
        if not layers:
            raise ValueError("nothing to merge: a chain without layers is its base")
        files.base_size(base)
        merged = _joined(layers)
        files.check_absent(target)
        _write(target, merged)

    def _flatten(self, base: Path, chain: Sequence[Path], target: Path) -> None:
        self._fail()
        files.base_size(base)
        whole = _joined(chain)
        files.check_absent(target)
        _copy_sparse(base, target, whole.size_mb << 20)
        with target.open("r+b") as writer:
            for block, value in whole.blocks.items():
                writer.seek(block * BLOCK_BYTES)
                writer.write(bytes([value]) * BLOCK_BYTES)

    def _fail(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure


def _content(overlay: Path) -> FakeContent:
    try:
        return msgspec.json.decode(overlay.read_bytes(), type=FakeContent)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise OverlayDamaged(f"{overlay} is not an overlay: {error}") from error


def _write(overlay: Path, content: FakeContent) -> None:
    overlay.write_bytes(msgspec.json.encode(content))


def _joined(chain: Sequence[Path]) -> FakeContent:
    files.check_present(chain)
    blocks: dict[int, int] = {}
    for layer in chain:
        blocks |= _content(layer).blocks
    return FakeContent(_content(chain[-1]).size_mb, blocks)


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
