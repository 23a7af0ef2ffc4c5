"""What every overlay driver promises (agent/storage/overlay.py), the fake included."""

from __future__ import annotations

import pytest

from agent.storage.overlay import (
    BaseMissing,
    OverlayDamaged,
    OverlayExists,
    OverlayMissing,
    OverlayTooSmall,
)

MIB = 1 << 20


async def test_a_fresh_overlay_takes_next_to_nothing(overlays, base, tmp_path):
    """Usage counts allocated blocks: a disk of 1 GiB that nobody wrote to costs less than 1 MiB."""
    overlay = tmp_path / "disk"
    await overlays.create(base, overlay, 1024)
    assert 0 < overlays.usage(overlay) < MIB


async def test_usage_is_allocated_blocks_not_apparent_size(overlays, base, tmp_path):
    """A hole of 64 MiB in the file is not counted, a written MiB is."""
    overlay = tmp_path / "disk"
    await overlays.create(base, overlay, 1024)
    before = overlays.usage(overlay)
    with overlay.open("r+b") as file:
        file.seek(64 * MIB)
        file.write(b"x" * MIB)
    assert MIB <= overlays.usage(overlay) - before < 2 * MIB


async def test_an_existing_file_is_not_overwritten(overlays, base, tmp_path):
    """Creating twice under one name is refused, and the first one keeps its content."""
    overlay = tmp_path / "disk"
    overlay.write_bytes(b"precious")
    with pytest.raises(OverlayExists):
        await overlays.create(base, overlay, 1024)
    assert overlay.read_bytes() == b"precious"


async def test_a_missing_base_is_said(overlays, tmp_path):
    """No base image: a typed error, and no overlay is left."""
    with pytest.raises(BaseMissing, match="absent"):
        await overlays.create(tmp_path / "absent", tmp_path / "disk", 1024)
    assert not (tmp_path / "disk").exists()


async def test_a_disk_smaller_than_its_base_is_refused(overlays, base, tmp_path):
    """It would cut the file system off; the message says what is needed."""
    with pytest.raises(OverlayTooSmall, match="4 MiB"):
        await overlays.create(base, tmp_path / "disk", 3)
    assert not (tmp_path / "disk").exists()


async def test_removing_is_idempotent(overlays, base, tmp_path):
    """Removing what is not there is no error: the undo of a half-made sandbox removes everything it may have."""
    overlay = tmp_path / "disk"
    await overlays.create(base, overlay, 1024)
    await overlays.remove(overlay)
    assert not overlay.exists()
    await overlays.remove(overlay)


def test_usage_of_a_missing_overlay_is_said(overlays, tmp_path):
    """A size of nothing is an error, not zero."""
    with pytest.raises(OverlayMissing):
        overlays.usage(tmp_path / "absent")


async def test_flattening_gives_the_whole_disk_raw(overlays, base, tmp_path):
    """The target has the disk's size, the base's content, and holes where both have nothing."""
    overlay, target = tmp_path / "disk", tmp_path / "flat"
    await overlays.create(base, overlay, 64)
    await overlays.flatten(base, overlay, target)
    content = target.read_bytes()
    assert len(content) == 64 * MIB
    assert content[: 4 * MIB] == base.read_bytes()
    assert not any(content[4 * MIB :])
    assert target.stat().st_blocks * 512 < MIB


async def test_flattening_does_not_overwrite(overlays, base, tmp_path):
    """A target that exists is left alone."""
    overlay, target = tmp_path / "disk", tmp_path / "flat"
    await overlays.create(base, overlay, 64)
    target.write_bytes(b"precious")
    with pytest.raises(OverlayExists):
        await overlays.flatten(base, overlay, target)
    assert target.read_bytes() == b"precious"


async def test_flattening_refuses_an_overlay_of_something_else(overlays, base, tmp_path):
    """A VMM that a guest took over can write any backing file into its overlay; root must not read that for it."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * MIB)
    overlay = tmp_path / "disk"
    await overlays.create(secret, overlay, 64)
    with pytest.raises(OverlayDamaged):
        await overlays.flatten(base, overlay, tmp_path / "flat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.raw", "disk", "secret"]


async def test_flattening_refuses_a_damaged_overlay(overlays, base, tmp_path):
    """What is no overlay at all gives the typed error, and no target."""
    overlay = tmp_path / "disk"
    overlay.write_bytes(b"junk" * 1000)
    with pytest.raises(OverlayDamaged):
        await overlays.flatten(base, overlay, tmp_path / "flat")
    with pytest.raises(OverlayMissing):
        await overlays.flatten(base, tmp_path / "absent", tmp_path / "flat")
    assert not (tmp_path / "flat").exists()
