"""What every overlay driver promises (agent/storage/overlay.py), the fake included."""

from __future__ import annotations

import pytest

from agent.storage.fake import BLOCK_BYTES
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


async def test_flattening_never_follows_a_recorded_name(overlays, base, tmp_path):
    """A VMM that a guest took over can write any backing file into its overlay; root must not read that for it."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * MIB)
    overlay = tmp_path / "disk"
    await overlays.create(secret, overlay, 64)
    await overlays.flatten(base, overlay, tmp_path / "flat")
    assert (tmp_path / "flat").read_bytes()[: 4 * MIB] == base.read_bytes()


async def test_flattening_refuses_a_damaged_overlay(overlays, base, tmp_path):
    """What is no overlay at all gives the typed error, and no target."""
    overlay = tmp_path / "disk"
    overlay.write_bytes(b"junk" * 1000)
    with pytest.raises(OverlayDamaged):
        await overlays.flatten(base, overlay, tmp_path / "flat")
    with pytest.raises(OverlayMissing):
        await overlays.flatten(base, tmp_path / "absent", tmp_path / "flat")
    assert not (tmp_path / "flat").exists()


async def test_a_chain_reads_as_its_uppermost_writes(overlays, base, fill, read, tmp_path):
    """Base, layers and overlay: of each block the uppermost says what it holds, zeros included."""
    below, above, disk = (tmp_path / name for name in ("below", "above", "disk"))
    await overlays.create(base, below, 64)
    await fill(below, 1, 0xA1)
    await fill(below, 2, 0xA2)
    await overlays.freeze(below, 64)
    await overlays.create(base, above, 64, layers=[below])
    await fill(above, 2, 0xB2, layers=[below])
    await fill(above, 0, 0, layers=[below])
    await overlays.freeze(above, 64)
    await overlays.create(base, disk, 64, layers=[below, above])
    await fill(disk, 3, 0xC3, layers=[below, above])
    content = await read(below, above, disk)
    assert [content[block * BLOCK_BYTES] for block in range(4)] == [0, 0xA1, 0xB2, 0xC3]
    assert content[4 * BLOCK_BYTES : 4 * MIB] == base.read_bytes()[4 * BLOCK_BYTES :]


async def test_two_overlays_share_layers_and_leave_them_alone(overlays, base, fill, read, tmp_path):
    """What one writes the other does not see, and no byte of the layer changes."""
    layer, one, two = (tmp_path / name for name in ("layer", "one", "two"))
    await overlays.create(base, layer, 64)
    await fill(layer, 1, 0xA1)
    await overlays.freeze(layer, 64)
    before = layer.read_bytes()
    for overlay, value in ((one, 0x11), (two, 0x22)):
        await overlays.create(base, overlay, 64, layers=[layer])
        await fill(overlay, 2, value, layers=[layer])
    assert {(await read(layer, disk))[BLOCK_BYTES] for disk in (one, two)} == {0xA1}
    assert [(await read(layer, disk))[2 * BLOCK_BYTES] for disk in (one, two)] == [0x11, 0x22]
    await overlays.merge(base, [layer, one], tmp_path / "merged")
    await overlays.remove(one)
    assert layer.read_bytes() == before


async def test_merged_layers_hold_what_they_held(overlays, base, fill, read, tmp_path):
    """One layer instead of two, the same disk: uppermost writes, zeros over data, zeros over the base."""
    below, above, merged = (tmp_path / name for name in ("below", "above", "merged"))
    await overlays.create(base, below, 64)
    for block in (1, 2, 3):
        await fill(below, block, 0xA0 + block)
    await overlays.create(base, above, 64, layers=[below])
    await fill(above, 2, 0xB2, layers=[below])
    await fill(above, 3, 0, layers=[below])
    await fill(above, 0, 0, layers=[below])
    await overlays.merge(base, [below, above], merged)
    content = await read(merged)
    assert content == await read(below, above)
    assert [content[block * BLOCK_BYTES] for block in range(4)] == [0, 0xA1, 0xB2, 0]
    await overlays.freeze(merged, 64)


async def test_merging_does_not_overwrite(overlays, base, tmp_path):
    """A target that exists is left alone."""
    layer, target = tmp_path / "layer", tmp_path / "merged"
    await overlays.create(base, layer, 64)
    target.write_bytes(b"precious")
    with pytest.raises(OverlayExists):
        await overlays.merge(base, [layer], target)
    assert target.read_bytes() == b"precious"


async def test_merging_says_what_is_missing_or_damaged(overlays, base, tmp_path):
    """A layer that is gone or junk, a base that is gone: typed errors that name the file, and no target."""
    layer, junk, target = tmp_path / "layer", tmp_path / "junk", tmp_path / "merged"
    await overlays.create(base, layer, 64)
    junk.write_bytes(b"junk" * 1000)
    with pytest.raises(OverlayMissing, match="absent"):
        await overlays.merge(base, [layer, tmp_path / "absent"], target)
    with pytest.raises(OverlayDamaged, match="junk"):
        await overlays.merge(base, [junk, layer], target)
    with pytest.raises(BaseMissing, match="absent"):
        await overlays.merge(tmp_path / "absent", [layer], target)
    with pytest.raises(ValueError, match="nothing to merge"):
        await overlays.merge(base, [], target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.raw", "junk", "layer"]


async def test_freezing_refuses_what_is_no_overlay(overlays, base, tmp_path):
    """Junk, a disk of another size, nothing at all: each is said, naming the file."""
    overlay, junk = tmp_path / "disk", tmp_path / "junk"
    await overlays.create(base, overlay, 64)
    await overlays.freeze(overlay, 64)
    junk.write_bytes(b"junk" * 1000)
    with pytest.raises(OverlayDamaged, match="junk"):
        await overlays.freeze(junk, 64)
    with pytest.raises(OverlayDamaged, match="disk of 65 MiB"):
        await overlays.freeze(overlay, 65)
    with pytest.raises(OverlayMissing, match="absent"):
        await overlays.freeze(tmp_path / "absent", 64)


async def test_usage_counts_the_layers_too(overlays, base, fill, tmp_path):
    """The sum of what the files take; a layer that is gone is an error."""
    layer, overlay = tmp_path / "layer", tmp_path / "disk"
    await overlays.create(base, layer, 64)
    await fill(layer, 1, 1)
    await overlays.create(base, overlay, 64, layers=[layer])
    assert overlays.usage(overlay, [layer]) == overlays.usage(overlay) + overlays.usage(layer)
    with pytest.raises(OverlayMissing, match="absent"):
        overlays.usage(overlay, [tmp_path / "absent"])


async def test_an_overlay_fits_its_layers(overlays, base, tmp_path):
    """A missing, damaged or larger top layer is refused before anything is made; a smaller one is all right."""
    layer, junk, disk = tmp_path / "layer", tmp_path / "junk", tmp_path / "disk"
    await overlays.create(base, layer, 64)
    junk.write_bytes(b"junk" * 1000)
    with pytest.raises(OverlayTooSmall, match="63 MiB"):
        await overlays.create(base, disk, 63, layers=[layer])
    with pytest.raises(OverlayMissing, match="absent"):
        await overlays.create(base, disk, 64, layers=[tmp_path / "absent"])
    with pytest.raises(OverlayDamaged, match="junk"):
        await overlays.create(base, disk, 64, layers=[junk])
    assert not disk.exists()
    await overlays.create(base, disk, 65, layers=[layer])
