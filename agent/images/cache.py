"""The steps of a build, each kept under a key made of what it depends on: only what changed is made again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent.images.files import digest_file, discard, publish, temporary_directory

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = ".parts"
RECORD = "part.json"


class Record(msgspec.Struct, frozen=True):
    """`part.json`: a part's files as {path: (bytes, digest)}, and what was found out while making it."""

    files: dict[str, tuple[int, str]]
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """The finished result of a step."""

    path: Path
    key: str
    record: Record

    def digest(self, name: str) -> str:
        """The digest of the part's file `name`."""
        return self.record.files[name][1]


def cached(
    store: Path,
    kind: str,
    *,
    inputs: dict[str, Any],
    make: Callable[[Path, Path], dict[str, Any]],
    refresh: bool = False,
) -> Part:
    """The part `kind` made from `inputs`; `make(scratch, into)` fills the directory `into` and returns details.

    Only under the store's lock. A part that lost a file is made again, with `refresh` every one.
    """
    canonical = msgspec.json.encode(inputs, order="deterministic")
    key = hashlib.sha256(canonical).hexdigest()
    folder = store / PARTS / f"{kind}-{key[:32]}"
    record = None if refresh else _load(folder)
    if record is not None:
        return Part(folder, key, record)
    with temporary_directory(store) as work:
        scratch, into = work / "scratch", work / "into"
        scratch.mkdir()
        into.mkdir()
        details = make(scratch, into)
        record = _record(into, details)
        (into / RECORD).write_bytes(msgspec.json.encode(record))
        if folder.exists():
            discard(store, folder)
        publish(into, folder)
    return Part(folder, key, record)


def remove_unused(store: Path) -> None:
    """Remove the parts that no image shares a file with. Only under the store's lock.

    A part is cheap to lose: on a file system without hard links all of them go, and the next build makes them again.
    """
    parts = store / PARTS
    for folder in parts.iterdir() if parts.is_dir() else ():
        if not any(file.stat().st_nlink > 1 for file in folder.rglob("*") if file.is_file()):
            discard(store, folder)


def _record(into: Path, details: dict[str, Any]) -> Record:
    files = {}
    for file in sorted(path for path in into.rglob("*") if path.is_file()):
        file.chmod(0o444)
        files[str(file.relative_to(into))] = (file.stat().st_size, digest_file(file))
    return Record(files, details)


def _load(folder: Path) -> Record | None:
    """The record of a part, or None when there is no such part or it is not whole."""
    try:
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=Record)
        whole = all((folder / name).stat().st_size == size for name, (size, _) in record.files.items())
    except (OSError, msgspec.DecodeError):
        return None
    return record if whole else None
