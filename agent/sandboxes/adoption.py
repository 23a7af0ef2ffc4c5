"""What a starting agent does with what an earlier one left: adopt VMs that run, take down everything else.

An earlier agent may have been killed between any two steps. The order here: processes first (they hold disks and taps),
then directories; slots that no adopted sandbox holds are removed by the slot pool when it starts.
"""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio

from agent.net.addresses import FIRST_SLOT, LAST_SLOT
from agent.sandboxes.build import DISK_FILE, spec
from agent.sandboxes.removal import forget
from agent.storage.overlay import StorageError
from agent.vmm.driver import Vm, VmmError, VmProcess

if TYPE_CHECKING:
    from pathlib import Path

    from agent.net.ledger import Slot
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record

log = structlog.get_logger()

SLOT_NUMBERS = range(FIRST_SLOT, LAST_SLOT + 1)


class StateDirectoryInUse(Exception):  # noqa: N818 - reads as what happened
    """Another agent serves from this state directory."""


@dataclass(frozen=True)
class Adopted:
    """A sandbox whose VM runs on."""

    record: Record
    vm: Vm
    slot: Slot


def lock_state_directory(root: Path) -> int:
    """Take the lock that makes us the only agent here; held until the process ends. Raises StateDirectoryInUse."""
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(fd)
        raise StateDirectoryInUse(f"another agent serves from {root}") from err
    return fd


async def adopt_all(parts: HostParts) -> list[Adopted]:
    """Adopt and collect; afterwards disk and process table hold what the result says, and what would not go.

    The latter keeps its slot and is tried again at the next start: one VM that hangs in the kernel, or a disk that
    fails, must not keep the agent from its other VMs.
    """
    began = time.perf_counter()
    records = await trio.to_thread.run_sync(parts.state.load)
    processes = await trio.to_thread.run_sync(parts.vms.find_orphans, parts.state.sandboxes)
    alive: dict[int, tuple[Record, Vm]] = {}
    stuck: set[int] = set()
    for sandbox_id, record in records.items():
        process = processes.pop(parts.state.directory(sandbox_id), None)
        vm = await _adopt(parts, record, process)
        if record is not None and vm is not None and record.slot not in alive:
            alive[record.slot] = (record, vm)
        elif not await _collect(parts, sandbox_id, record, process) and record is not None:
            stuck.add(record.slot)
    for directory, process in processes.items():
        await _kill_stray(parts, directory, process)
    await parts.vms.remove_leftovers()
    leases = parts.slots.adopt(number for number in alive.keys() | stuck if number in SLOT_NUMBERS)
    adopted = [Adopted(record, vm, leases[number]) for number, (record, vm) in alive.items()]
    log.info("adoption_done", adopted=len(adopted), found=len(records), seconds=round(time.perf_counter() - began, 3))
    return adopted


async def _adopt(parts: HostParts, record: Record | None, process: VmProcess | None) -> Vm | None:
    if record is None or record.phase != "running" or record.process is None or process is None:
        return None
    if record.slot not in SLOT_NUMBERS:
        return None
    try:
        description = spec(parts, record, tap_fd=-1)
    except ValueError as err:
        log.error("sandbox_record_impossible", sandbox_id=record.sandbox_id, error=str(err))  # noqa: TRY400
        return None
    return await parts.vms.adopt(description, VmProcess(record.process.pid, record.process.start_time))


async def _collect(parts: HostParts, sandbox_id: str, record: Record | None, process: VmProcess | None) -> bool:
    """Remove what is left of one sandbox; False when it would not go."""
    log.info("leftover_collected", sandbox_id=sandbox_id, vm=process is not None)
    try:
        if process is not None:
            await parts.vms.kill_process(process)
        await parts.overlays.remove(parts.state.directory(sandbox_id) / DISK_FILE)
        if record is not None and record.phase == "running":
            await parts.outbox.append(sandbox_id, "died", "its VM was gone when the host's agent came back")
        await forget(parts, sandbox_id)
    except (VmmError, StorageError, OSError) as err:
        log.error("leftover_not_collected", sandbox_id=sandbox_id, error=str(err))  # noqa: TRY400
        return False
    return True


async def _kill_stray(parts: HostParts, directory: Path, process: VmProcess) -> None:
    """End a VM whose directory has gone."""
    try:
        await parts.vms.kill_process(process)
    except VmmError as err:
        log.error("stray_vm_not_killed", directory=str(directory), pid=process.pid, error=str(err))  # noqa: TRY400
    else:
        log.warning("stray_vm_killed", directory=str(directory), pid=process.pid)
