"""What the pager remembers of each VM, so that one that was killed finds its VMs again: `<directory>/vms/<id>.json`.

A record is replaced whole. It is not synced to the disk, but for a failure: it must outlive the pager, not the machine,
which takes the VMs with it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec
import structlog

from agent.pager.regions import Region
from agent.pager.service import PagedVm

log = structlog.get_logger()

VM_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
DAMAGED = ".damaged"


class Served(msgspec.Struct, frozen=True):
    """The VMM of a VM that has shaken hands.

    `descriptor`: the number of the userfaultfd in the VMM. `tracked`: the memory was write-protected as a whole, so
    that what counts as written and is not there was given back.
    """

    pid: int
    start_time: int
    descriptor: int
    regions: tuple[Region, ...]
    tracked: bool


class VmRecord(msgspec.Struct, frozen=True):
    """`served` None: its VMM has not connected. `failure`: why it is not served any more; `damaged`: because the
    snapshot's data is damaged."""

    vm: PagedVm
    served: Served | None = None
    failure: str | None = None
    damaged: bool = False


def encode_path(value: object) -> str:
    """For msgspec, which does not know paths."""
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"not a path: {value!r}")


def decode_path(kind: type, value: Any) -> Path:
    """For msgspec, which does not know paths."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"not a path: {value!r}")


_decoder = msgspec.json.Decoder(VmRecord, dec_hook=decode_path)


class VmRecords:
    """All of them. Everything blocks a little."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "vms"

    def prepare(self) -> None:
        """Make the directory."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def save(self, record: VmRecord) -> None:
        """Write a record; a failure durably. Raises OSError."""
        path = self._path(record.vm.vm_id)
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(record, enc_hook=encode_path))
            if record.failure is not None:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)

    def forget(self, vm_id: str) -> None:
        """Remove a record; harmless when it is gone. Raises OSError."""
        self._path(vm_id).unlink(missing_ok=True)

    def load(self) -> list[VmRecord]:
        """Every record. One that cannot be read is put aside and logged: its VM hangs and is the agent's to end."""
        found: list[VmRecord] = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                record = _decoder.decode(path.read_bytes())
            except (OSError, msgspec.MsgspecError) as err:
                log.error("pager_record_unreadable", path=str(path), error=str(err))  # noqa: TRY400 - no bug of ours
                path.replace(path.with_suffix(DAMAGED))
                continue
            found.append(record)
        return found

    def _path(self, vm_id: str) -> Path:
        return self.directory / f"{vm_id}.json"
