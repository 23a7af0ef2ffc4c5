"""The state directory: what the agent must know again after it was killed at any moment.

    <state>/lock                              held while an agent serves from here
    <state>/outbox.json                       see outbox.py
    <state>/sandboxes/<uuid>/record.json      one Record, replaced atomically
    <state>/sandboxes/<uuid>/disk.qcow2, …    what belongs to that sandbox alone

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


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one sandbox. `phase` tells a restarted agent what to do:

    making, removing: take down what is there; running: adopt it. `slot` 0: none was taken yet.
    """

    sandbox_id: str
    phase: Literal["making", "running", "removing"]
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


class StateDirectory:
    """Records on disk below `root` (absolute)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sandboxes = root / "sandboxes"

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
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
