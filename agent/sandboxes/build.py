"""Making one sandbox: from a snapshot if there is one to begin with, else step by step with a boot."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from agent.sandboxes.greeting import greet
from agent.sandboxes.made import as_fault, drop_snapshots, release_vm, save, spec
from agent.sandboxes.records import ProcessRecord
from agent.sandboxes.resuming import start_from, take_slot
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    import trio

    from agent.sandboxes.made import Golden, Made
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.starts import Start

log = structlog.get_logger()


async def build(parts: HostParts, made: Made, *, start: Start, nursery: trio.Nursery) -> None:
    """Make everything; the guest answers when this returns. Raises only Fault; cancellable at any point.

    `nursery` gets the guest link's task.
    """
    made.golden = start.golden
    if start.snapshot is not None:
        await start_from(parts, made, start.snapshot, envs=start.envs, nursery=nursery)
    elif start.golden is None or not await _start_golden(parts, made, start.golden, start.envs, nursery):
        await _start_cold(parts, made, start.envs or {}, nursery)


async def _start_golden(
    parts: HostParts, made: Made, golden: Golden, envs: dict[str, str] | None, nursery: trio.Nursery
) -> bool:
    """Whether it runs; else everything is as before, but for the time it took."""
    try:
        await start_from(parts, made, golden.id, envs=envs, nursery=nursery)
    except Fault as fault:
        log.warning("golden_start_failed", golden=str(golden.id), code=fault.code, message=fault.message)
        if fault.code in {FaultCode.SNAPSHOT_DAMAGED, FaultCode.NOT_FOUND}:
            golden.failed()
    else:
        return True
    try:
        await release_vm(parts, made)
        await parts.overlays.remove(parts.state.directory(made.record.sandbox_id) / made.record.disk)
        await drop_snapshots(parts, made.record.snapshots())
        made.source = made.golden = None
        if made.record.base:
            await save(parts, made, base="")
    except Exception as err:
        raise as_fault(err) from err
    return False


async def _start_cold(parts: HostParts, made: Made, envs: dict[str, str], nursery: trio.Nursery) -> None:
    try:
        await boot(parts, made, envs=envs, nursery=nursery)
        await save(parts, made, phase="running", started_at=time.time())
    except Fault:
        raise
    except Exception as err:
        raise as_fault(err) from err


async def boot(parts: HostParts, made: Made, *, envs: dict[str, str], nursery: trio.Nursery) -> None:
    """Everything but the last record; the guest has answered when this returns. Raises drivers' errors and Fault."""
    with made.step("queue"):
        await parts.boots.acquire()
    try:
        await _boot(parts, made)
        with made.step("guest"):
            await greet(parts, made, nursery, envs=envs)
    finally:
        parts.boots.release()


async def _boot(parts: HostParts, made: Made) -> None:
    directory = parts.state.directory(made.record.sandbox_id)
    with made.step("slot"):
        slot = await take_slot(parts, made)
    with made.step("overlay"):
        await parts.overlays.create(Path(made.record.rootfs), directory / made.record.disk, made.record.disk_mb)
    with made.step("vmm"):
        tap = await parts.slot_backend.open_tap(slot.number)
        try:
            made.vm = await parts.vms.boot(spec(parts, made.record, tap_fd=tap))
        finally:
            os.close(tap)
        process = made.vm.process
        await save(parts, made, process=ProcessRecord(process.pid, process.start_time))
