"""Where things lie.

    <root>/snapshots/<uuid>/{manifest.json,mem.header,vm.state,working-set}    one snapshot
    <root>/builds/<uuid>/{data,sums}                                           memory, shared, immutable
    <root>/layers/<uuid>.qcow2                                                 disk, shared, immutable
    .partial-<uuid>, .removed-<uuid>                                           a snapshot being made; rubbish

Other names are nobody's business here and stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import UUID, uuid4

from agent.snapshots import files

PARTIAL = ".partial-"
REMOVED = ".removed-"
LAYER_SUFFIX = ".qcow2"
WORKING_SET = "working-set"


class Layout:
    """The directories below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.snapshots = root / "snapshots"
        self.builds = root / "builds"
        self.layers = root / "layers"

    @property
    def directories(self) -> tuple[Path, ...]:
        """The three of them."""
        return self.snapshots, self.builds, self.layers

    def snapshot(self, snapshot_id: UUID) -> Path:
        """Where a snapshot lies."""
        return self.snapshots / str(snapshot_id)

    def partial(self, snapshot_id: UUID) -> Path:
        """Where it lies while it is being made."""
        return self.snapshots / f"{PARTIAL}{snapshot_id}"

    def build(self, build: UUID) -> Path:
        """Where a memory build lies."""
        return self.builds / str(build)

    def layer(self, layer: UUID) -> Path:
        """Where a disk layer lies."""
        return self.layers / f"{layer}{LAYER_SUFFIX}"


def ids(directory: Path, *, prefix: str = "", suffix: str = "") -> Iterator[UUID]:
    """The ids that name something in `directory`."""
    for path in directory.iterdir():
        name = path.name
        if name.startswith(prefix) and name.endswith(suffix):
            middle = name[len(prefix) : len(name) - len(suffix)]
            with suppress(ValueError):
                found = UUID(middle)
                if str(found) == middle:
                    yield found


def set_aside(path: Path) -> Path:
    """Make `path` vanish at once; returns the rubbish to remove. Dying now leaves that rubbish."""
    rubbish = path.with_name(f"{REMOVED}{uuid4()}")
    files.rename(path, rubbish)
    return rubbish


def remove_tree(path: Path) -> None:
    """Remove a file or a directory with all that is in it; harmless when it is gone, links are not followed."""
    if path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):
            for entry in list(path.iterdir()):
                remove_tree(entry)
        files.remove_directory(path)
    else:
        files.unlink(path)
