"""What a starting agent does with what an earlier one left: adopt VMs that run, take down everything else.

An earlier agent may have been killed between any two steps. The order here: processes first (they hold disks and taps),
then directories; slots that no adopted sandbox holds are removed by the slot pool when it starts.
"""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from agent.sandboxes.build import spec
from agent.vmm.driver import Vm, VmProcess

if TYPE_CHECKING:
    from pathlib import Path

    from agent.net.ledger import Slot
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record

log = structlog.get_logger()


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
    """Adopt and collect; afterwards disk and process table hold what the result says and nothing else."""
    began = time.perf_counter()
    records = await trio.to_thread.run_sync(parts.state.load)
    processes = await trio.to_thread.run_sync(parts.vms.find_orphans, parts.state.sandboxes)
    alive: list[tuple[Record, Vm]] = []
    for sandbox_id, record in records.items():
        process = processes.pop(parts.state.directory(sandbox_id), None)
        vm = await _adopt(parts, record, process)
        if record is not None and vm is not None:
            alive.append((record, vm))
            continue
        if record is not None and record.phase == "running":
            await parts.outbox.append(sandbox_id, "died", "its VM was gone when the host's agent came back")
        await _collect(parts, sandbox_id, process)
    for directory, process in processes.items():
        log.warning("orphan_vm_killed", directory=str(directory), pid=process.pid)
        await parts.vms.kill_process(process)
    await parts.vms.remove_leftovers()
    leases = parts.slots.adopt(record.slot for record, _ in alive)
    adopted = [Adopted(record, vm, leases[record.slot]) for record, vm in alive]
    log.info("adoption_done", adopted=len(adopted), found=len(records), seconds=round(time.perf_counter() - began, 3))
    return adopted


async def _adopt(parts: HostParts, record: Record | None, process: VmProcess | None) -> Vm | None:
    if record is None or record.phase != "running" or record.process is None or process is None:
        return None
    return await parts.vms.adopt(
        spec(parts, record, tap_fd=-1), VmProcess(record.process.pid, record.process.start_time)
    )


async def _collect(parts: HostParts, sandbox_id: str, process: VmProcess | None) -> None:
    log.info("leftover_collected", sandbox_id=sandbox_id, vm=process is not None)
    if process is not None:
        await parts.vms.kill_process(process)
    await trio.to_thread.run_sync(partial(parts.state.forget, sandbox_id))
