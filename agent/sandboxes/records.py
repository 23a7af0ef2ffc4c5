"""The state directory: what the agent must know again after it was killed at any moment.

    <state>/lock                              held while an agent serves from here
    <state>/outbox.json                       see outbox.py
    <state>/sandboxes/<uuid>/record.json      one Record, replaced atomically
    <state>/sandboxes/<uuid>/disk.qcow2, …    what belongs to that sandbox alone
    <state>/snapshots/                        see agent/snapshots/store.py

A record is written before anything is made for its sandbox, and its directory goes last: whatever a crash leaves
behind is found from here. All functions block on the disk: call them in a thread.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import msgspec
import structlog

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger()

RECORD_FILE = "record.json"

SANDBOX_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""What a sandbox's directory is called; anything else beside them (`lost+found`, an operator's notes) is not ours."""


class ProcessRecord(msgspec.Struct, frozen=True):
    """Identity of a VMM process: pid, and start time in clock ticks since boot."""

    pid: int
    start_time: int


Phase = Literal["making", "running", "paused", "removing", "damaged"]

FIRST_DISK = "disk.qcow2"
DISK = re.compile(r"disk(?:-(\d{1,9}))?\.qcow2")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one sandbox. `phase` tells a restarted agent what to do:

    making, removing: take down what is there; running: adopt its VM; paused: end a VM that is still there, keep `base`;
    damaged: its memory could not be served, everything stays for whoever wants to look.

    `slot` 0: none was taken yet; of a paused one, the slot that a VM left over may still have.
    `base`: the snapshot that it rests as, or that its next one is a difference to; "" for one that was never paused.
    `origin`: the snapshot that the pager serves the running VM from; its owner, too.
    The disk, bottom to top: `rootfs`, the layers of `base`, `frozen` and `disk` (names in its directory). `next_disk`:
    the VM may write to that one already, it knows (a live checkpoint was under way).
    `untracked`: the record of dirty pages does not begin at `base`; what changed must be found by comparison.
    `untold`: a pause that the outbox does not have yet. `disk_bytes`: allocated by `base`, shared parts included.
    `scattered`: `base` lies in so many builds or layers that one of each would be better.
    """

    sandbox_id: str
    phase: Phase
    template: str
    vcpus: int
    memory_mb: int
    disk_mb: int
    hostname: str
    kernel: str
    initramfs: str
    rootfs: str
    slot: int = 0
    process: ProcessRecord | None = None
    started_at: float = 0.0
    image_digest: str = ""
    timeout_sec: int = 0
    base: str = ""
    origin: str = ""
    frozen: tuple[str, ...] = ()
    disk: str = FIRST_DISK
    next_disk: str = ""
    untracked: bool = False
    untold: str = ""
    disk_bytes: int = 0
    scattered: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError (for the reader of a file: a ValidationError) for names that are none of ours."""
        if not all(DISK.fullmatch(name) for name in (self.disk, *self.frozen, self.next_disk or FIRST_DISK)):
            raise ValueError("a disk has another name")
        if not all(name == "" or SANDBOX_ID.fullmatch(name) for name in (self.base, self.origin)):
            raise ValueError("a snapshot has another name")

    def snapshots(self) -> set[str]:
        """Ids of the snapshots that belong to this sandbox."""
        return {name for name in (self.base, self.origin) if name}

    def disk_after(self) -> str:
        """A name for the next disk that no earlier one has."""
        found = DISK.fullmatch(self.next_disk or self.disk)
        return f"disk-{int(found[1] or 0) + 1 if found else 1}.qcow2"


class StateDirectory:
    """Records on disk below `root` (absolute)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sandboxes = root / "sandboxes"
        self.snapshots = root / "snapshots"

    def prepare(self) -> None:
        """Make the directories. The VMM's user must reach its own sandbox's directory, and can list none."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o711)
        self.sandboxes.mkdir(exist_ok=True)
        self.sandboxes.chmod(0o711)

    def directory(self, sandbox_id: str) -> Path:
        """Where everything of one sandbox lies."""
        return self.sandboxes / sandbox_id

    def save(self, record: Record) -> None:
        """Write a record durably; the directory is made for a new sandbox."""
        directory = self.directory(record.sandbox_id)
        directory.mkdir(exist_ok=True)
        directory.chmod(0o711)  # whatever our umask is
        write_atomically(directory / RECORD_FILE, msgspec.json.encode(record))

    def forget(self, sandbox_id: str) -> None:
        """Remove a sandbox's directory; harmless when it is gone."""
        directory = self.directory(sandbox_id)
        # The record goes first: half a directory without one is rubbish to collect, a record without its disk is not.
        (directory / RECORD_FILE).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            shutil.rmtree(directory)

    def read(self, sandbox_id: str) -> Record | None:
        """The record on disk, None where it is missing, unreadable or another one's."""
        return _read(self.directory(sandbox_id))

    def tidy(self, record: Record) -> None:
        """Remove all but the record from a paused sandbox's directory: disks, sockets and logs of its VMs."""
        for entry in self.directory(record.sandbox_id).iterdir():
            if entry.name == RECORD_FILE:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    def remove_stray_disks(self, record: Record) -> None:
        """Remove disks that a running sandbox does not have any more: they have become layers."""
        known = {record.disk, record.next_disk, *record.frozen}
        for entry in self.directory(record.sandbox_id).iterdir():
            if DISK.fullmatch(entry.name) and entry.name not in known:
                entry.unlink(missing_ok=True)

    def forget_snapshots(self) -> None:
        """Remove all snapshots, of whatever kind."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.snapshots)

    def load(self) -> dict[str, Record | None]:
        """Every sandbox directory with its record; None where the record is missing, unreadable or another one's."""
        found: dict[str, Record | None] = {}
        for directory in self.sandboxes.iterdir():
            if SANDBOX_ID.fullmatch(directory.name) and directory.is_dir() and not directory.is_symlink():
                found[directory.name] = _read(directory)
            else:
                log.warning("foreign_entry_ignored", path=str(directory))
        return found


def _read(directory: Path) -> Record | None:
    try:
        record = msgspec.json.decode((directory / RECORD_FILE).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError) as err:
        log.warning("sandbox_record_unreadable", directory=directory.name, error=str(err))
        return None
    if record.sandbox_id != directory.name:
        log.warning("sandbox_record_misplaced", directory=directory.name, sandbox_id=record.sandbox_id)
        return None
    return record


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by a file with `data`, durably: after a crash either the old or the new one is there, whole."""
    temporary = path.with_name(path.name + ".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
