"""`manifest.json`: what a snapshot is and needs. It is the last file to be written, so its presence is the proof.

One line of canonical JSON, then one with the SHA-256 of the first in hex. Ids are UUIDs, times are UTC.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

import msgspec

from agent.snapshots import files
from agent.snapshots.errors import ManifestDamaged

MANIFEST = "manifest.json"
HEADER = "mem.header"
STATE = "vm.state"

MAX_BYTES = 1 << 20
MAX_PARTS = 4096
"""Builds or layers of one snapshot; a few dozen is usual."""

Kind = Literal["sandbox", "named", "golden"]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
Ids = Annotated[tuple[UUID, ...], msgspec.Meta(max_length=MAX_PARTS)]


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What whoever makes a snapshot says of it.

    `owner`: the sandbox's id, "" for a named one, the key of a golden one. `kernel`, `initramfs` and `rootfs`: absolute
    paths of the image's files. `vmm`: its name and version.
    """

    kind: Kind
    owner: Text
    image_name: Text
    image_digest: Text
    kernel: Text
    initramfs: Text
    rootfs: Text
    vcpus: Count
    memory_mb: Count
    disk_mb: Count
    vmm: Text


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the snapshot: bytes, and SHA-256 in hex."""

    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Manifest(Description, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a snapshot consists of. `builds`: sorted. `layers`: bottom to top. `files`: mem.header and vm.state."""

    version: Literal[1] = 1
    id: UUID
    created_at: datetime
    generation: Count
    builds: Ids
    layers: Ids
    files: dict[str, FileRecord]

    def encode(self) -> bytes:
        """The file's content."""
        line = msgspec.json.encode(self, order="deterministic") + b"\n"
        return line + _digest(line)

    @property
    def description(self) -> Description:
        """What its maker said of it."""
        return msgspec.convert({name: getattr(self, name) for name in Description.__struct_fields__}, Description)


def decode(data: bytes, *, name: str) -> Manifest:
    """Read what `Manifest.encode` wrote. Raises ManifestDamaged, which names the file `name`."""
    try:
        return _decode(data)
    except (ValueError, msgspec.MsgspecError, RecursionError) as err:
        raise ManifestDamaged(f"{name} is damaged ({err}): restore it from a backup or remove the snapshot") from err


def read(directory: Path) -> Manifest:
    """The manifest of the snapshot in `directory`, which is called by its id. Raises ManifestDamaged, StoreFailed."""
    path = directory / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as err:
        raise files.unreadable(err, "the manifest of a snapshot", ManifestDamaged) from err
    found = decode(data, name=str(path))
    if str(found.id) != directory.name:
        raise ManifestDamaged(f"{path} is the manifest of {found.id}")
    return found


def _decode(data: bytes) -> Manifest:
    if len(data) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes")
    line, newline, digest = data.partition(b"\n")
    line += newline
    if digest != _digest(line):
        raise ValueError("its checksum differs")
    manifest = msgspec.json.decode(line, type=Manifest)
    if set(manifest.files) != {HEADER, STATE}:
        raise ValueError(f"it lists the files {sorted(manifest.files)}")
    if manifest.created_at.utcoffset() != timedelta(0):
        raise ValueError("its time is not in UTC")
    if msgspec.json.encode(manifest, order="deterministic") + b"\n" != line:
        raise ValueError("it is not in canonical form")
    return manifest


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest().encode() + b"\n"
