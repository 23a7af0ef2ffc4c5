"""The manifest's file against every kind of harm."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.snapshots import manifest
from agent.snapshots.errors import ManifestDamaged
from agent.snapshots.manifest import Description, FileRecord, Manifest
from tests.snapshots.disk import description

EXAMPLE = Manifest(
    **msgspec.structs.asdict(description()),
    id=UUID(int=1, version=4),
    created_at=datetime(2026, 8, 1, 12, 30, tzinfo=UTC),
    generation=3,
    builds=(UUID(int=2, version=4), UUID(int=3, version=4)),
    layers=(UUID(int=9, version=4),),
    files={
        "mem.header": FileRecord(size=104, sha256="0" * 64),
        "vm.state": FileRecord(size=0, sha256="f" * 64),
    },
)


def signed(line: bytes) -> bytes:
    return line + hashlib.sha256(line).hexdigest().encode() + b"\n"


def refused(content: bytes) -> bool:
    """Whether it is refused by name; if it is not, it must be exactly what encode writes."""
    try:
        found = manifest.decode(content, name="some/manifest.json")
    except ManifestDamaged as err:
        return str(err).startswith("some/manifest.json is damaged")
    return found.encode() != content


manifests = st.builds(
    Manifest,
    kind=st.sampled_from(["sandbox", "named", "golden"]),
    **dict.fromkeys(
        ["owner", "image_name", "image_digest", "kernel", "initramfs", "rootfs", "vmm"], st.text(max_size=9)
    ),
    **dict.fromkeys(["vcpus", "memory_mb", "disk_mb", "generation"], st.integers(1, 1 << 32)),
    version=st.just(1),
    id=st.uuids(),
    created_at=st.datetimes(timezones=st.just(UTC)),
    builds=st.lists(st.uuids(), max_size=4).map(tuple),
    layers=st.lists(st.uuids(), max_size=4).map(tuple),
    files=st.fixed_dictionaries(
        dict.fromkeys(
            ["mem.header", "vm.state"],
            st.builds(
                FileRecord, size=st.integers(0, 1 << 62), sha256=st.binary(min_size=32, max_size=32).map(bytes.hex)
            ),
        )
    ),
)


@given(manifests)
def test_encoding_comes_back(example):
    """Decoding what was encoded is the same manifest; the description is the maker's part of it."""
    found = manifest.decode(example.encode(), name="x")
    assert found == example
    assert found.encode() == example.encode()
    assert isinstance(found.description, Description)
    assert not isinstance(found.description, Manifest)


def test_every_flipped_bit_is_refused():
    """All of them: also in the checksum's line, where a letter's case could be taken for the same."""
    content = EXAMPLE.encode()
    for bit in range(len(content) * 8):
        harmed = bytearray(content)
        harmed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ManifestDamaged, match=r"some/manifest\.json"):
            manifest.decode(bytes(harmed), name="some/manifest.json")


def test_every_cut_and_anything_behind_is_refused():
    """A file that was not written to its end, or to which something was added."""
    content = EXAMPLE.encode()
    for length in range(len(content)):
        assert refused(content[:length])
    for tail in (b"\n", b" ", b"x", content):
        assert refused(content + tail)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(content):
    """Also with a right checksum."""
    assert refused(content)
    assert refused(signed(content))
    assert refused(signed(content + b"\n"))


@settings(max_examples=300)
@given(st.integers(0, len(EXAMPLE.encode()) - 66), st.binary(max_size=8), st.integers(0, 8))
def test_changed_content_with_a_right_checksum_is_valid_or_refused(position, inserted, removed):
    """Whoever can sign gets another manifest, never another kind of exception or a second way to write one."""
    line = EXAMPLE.encode().split(b"\n")[0]
    harmed = signed(line[:position] + inserted + line[position + removed :] + b"\n")
    try:
        found = manifest.decode(harmed, name="x")
    except ManifestDamaged:
        return
    assert found.encode() == harmed


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"kind": "other"},
        {"vcpus": 0},
        {"memory_mb": "1"},
        {"builds": ["not an id"]},
        {"id": None},
        {"files": {}},
        {"files": {"../../etc/passwd": {"size": 1, "sha256": "0" * 64}}},
        {"unknown": 1},
        {"created_at": "2026-08-01T12:30:00+02:00"},
        {"created_at": "2026-08-01T12:30:00"},
        {"image_name": "x" * 5000},
        {"layers": ["00000000-0000-4000-8000-000000000009"] * 5000},
    ],
)
def test_each_rule_is_kept(change):
    """A field of another type, out of bounds, missing or unknown; another version; a file name that leads elsewhere."""
    content = msgspec.json.decode(EXAMPLE.encode().split(b"\n")[0])
    assert not refused(signed(msgspec.json.encode(content) + b"\n"))
    content.update(change)
    with pytest.raises(ManifestDamaged):
        manifest.decode(signed(msgspec.json.encode(content) + b"\n"), name="x")


def test_sizes_are_bounded(tmp_path):
    """A huge file is not read whole, deep nesting is no crash."""
    directory = tmp_path / str(EXAMPLE.id)
    directory.mkdir()
    path = directory / "manifest.json"
    path.write_bytes(EXAMPLE.encode())
    assert manifest.read(directory) == EXAMPLE
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ManifestDamaged, match="longer than"):
        manifest.read(directory)
    assert refused(signed(b"[" * 100_000 + b"\n"))
    assert refused(signed(b'{"files":' + b"[" * 100_000 + b"\n"))
