"""From a snapshot to a running sandbox: its own one (a resume), or a copy of another's (a create).

Slot, overlay, pager, VMM, vCPUs, guest. Nothing but the last record says that it runs: a failure undoes the steps in
reverse, and whatever a restarted agent finds of them is removed; the snapshot has not changed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog
import trio

from agent.pager.service import ConnectTimeout, PagedVm, PagerError, PagingDamaged, SnapshotUnreadable
from agent.sandboxes.greeting import greet
from agent.sandboxes.made import as_fault, damaged, release_vm, save, spec
from agent.sandboxes.records import FIRST_DISK, ProcessRecord
from agent.snapshots.errors import SnapshotDamaged, SnapshotMissing
from agent.storage.overlay import StorageError
from agent.vmm.driver import VmmError, VmState
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agent.net.ledger import Slot
    from agent.sandboxes.made import Made
    from agent.sandboxes.parts import HostParts
    from agent.snapshots.loading import Snapshot

log = structlog.get_logger()

PAGE_SOCKET = "pages.sock"
SLOT_TIMEOUT = 30.0
"""Seconds to wait for a slot that is being made; one takes tens of milliseconds. A build holds up others meanwhile."""
PAGES_TIMEOUT = 60.0
"""Seconds for the VMM to connect to the pager, and for the working set to be brought in."""


async def resume(parts: HostParts, made: Made, *, nursery: trio.Nursery) -> None:
    """Have a paused sandbox run again. Raises Fault: it is still paused, and nothing is left of the attempt.

    Cancelled, it leaves what there is to a removal, or to the next agent. `nursery` gets the guest link's task.
    """
    made.timings_ms = {}
    failure: Exception | None = None
    try:
        with made.step("queue"):
            await parts.restores.acquire()
        try:
            await release_vm(parts, made)  # of a pause whose VM would not die
            await restore(parts, made, nursery=nursery, envs=None)
            await _note_running(parts, made)
        finally:
            parts.restores.release()
    except Exception as err:  # noqa: BLE001 - explained below
        failure = err
    if failure is not None:
        fault = await explain(parts, made, failure, task="resume the sandbox")
        await undo(parts, made)
        raise fault from failure


async def start_from(
    parts: HostParts, made: Made, source: UUID, *, envs: dict[str, str] | None, nursery: trio.Nursery
) -> None:
    """Have a new sandbox run from a copy of the snapshot `source`. Raises Fault; what there is is for a removal."""
    try:
        with made.step("queue"):
            await parts.restores.acquire()
        try:
            await restore(parts, made, source=source, nursery=nursery, envs=envs)
            await _note_running(parts, made, started_at=time.time())
        finally:
            parts.restores.release()
    except Exception as err:
        raise await explain(parts, made, err, task="start the sandbox") from err


async def restore(
    parts: HostParts, made: Made, *, nursery: trio.Nursery, envs: dict[str, str] | None, source: UUID | None = None
) -> None:
    """Everything but the last record; the guest has answered when this returns."""
    directory = parts.state.directory(made.record.sandbox_id)
    if source is None:
        own, disk = UUID(made.record.base), made.record.disk_after()
    else:
        own, disk = uuid4(), FIRST_DISK
    with made.step("slot"):
        slot = await take_slot(parts, made, base=str(own), disk=disk, next_disk="")
    with made.step("load"):
        snapshot = await _load(parts, made, own, source)
    with made.step("overlay"):
        await parts.overlays.remove(directory / disk)
        base = Path(made.record.rootfs)
        await parts.overlays.create(base, directory / disk, made.record.disk_mb, layers=snapshot.layers)
    await _start_vm(parts, made, slot, snapshot)
    with made.step("guest"):
        await greet(parts, made, nursery, envs=envs)


async def _load(parts: HostParts, made: Made, own: UUID, source: UUID | None) -> Snapshot:
    if source is None:
        return await trio.to_thread.run_sync(parts.snapshots.load, own)
    made.source = source
    owner = made.record.sandbox_id
    return await trio.to_thread.run_sync(lambda: parts.snapshots.copy(source, own, kind="sandbox", owner=owner))


async def _start_vm(parts: HostParts, made: Made, slot: Slot, snapshot: Snapshot) -> None:
    socket = parts.state.directory(made.record.sandbox_id) / PAGE_SOCKET
    with made.step("pager"):
        await parts.pager.listen(
            PagedVm(
                vm_id=made.record.sandbox_id,
                snapshot=snapshot.directory,
                builds=parts.snapshots.builds,
                socket=socket,
                uid=parts.uid_base + slot.number,
                prefetch=parts.prefetch,
            )
        )
    with made.step("vmm"):
        tap = await parts.slot_backend.open_tap(slot.number)
        try:
            description = spec(parts, made.record, tap_fd=tap, layers=snapshot.layers)
            made.vm = await parts.vms.restore(description, VmState(snapshot.state, socket))
        finally:
            os.close(tap)
    with made.step("memory"):
        await parts.pager.wait_connected(made.record.sandbox_id, timeout=PAGES_TIMEOUT)
    with made.step("cpus"):
        await made.vm.resume()


async def _note_running(parts: HostParts, made: Made, **changes: object) -> None:
    assert made.vm is not None  # noqa: S101 - its guest has answered
    process = ProcessRecord(made.vm.process.pid, made.vm.process.start_time)
    with made.step("commit"):
        await save(parts, made, phase="running", process=process, origin=made.record.base, **changes)


async def take_slot(parts: HostParts, made: Made, **changes: object) -> Slot:
    """Take a network slot and note it, with `changes`, before anything is made in it."""
    with trio.move_on_after(SLOT_TIMEOUT):
        made.slot = await parts.slots.acquire()
    if made.slot is None:
        raise Fault(FaultCode.NO_CAPACITY, "this host could not make a network slot in time", retryable=True)
    await save(parts, made, slot=made.slot.number, **changes)
    return made.slot


async def undo(parts: HostParts, made: Made) -> None:
    """Take back what a failed resume has made, last thing first. What does not go is tried again by the next one."""
    try:
        await release_vm(parts, made)
        await parts.overlays.remove(parts.state.directory(made.record.sandbox_id) / made.record.disk)
    except (VmmError, StorageError, OSError) as err:
        log.error("resume_not_undone", error=str(err))  # noqa: TRY400 - the error says it


async def explain(parts: HostParts, made: Made, err: Exception, *, task: str) -> Fault:
    """Why a sandbox did not come out of its snapshot. Damage the pager saw is the reason for what others saw.

    That a VM died, or could not be served this time, says nothing about its snapshot: it can be tried again.
    """
    fault = err if isinstance(err, Fault) else None
    match err:
        case SnapshotDamaged() | SnapshotUnreadable() | PagingDamaged():
            return damaged(parts, str(err))
        case SnapshotMissing() if made.source is None:
            return damaged(parts, f"snapshots/{made.record.base} is missing")
        case ConnectTimeout():
            return as_fault(err, task=task)
    if (reason := await paging_damage(parts, made)) is not None:
        return damaged(parts, reason)
    return fault or as_fault(err, task=task)


async def paging_failure(parts: HostParts, made: Made) -> str | None:
    """Why the pager ended the VM, if it did."""
    return await _ask(parts.pager.failure, made)


async def paging_damage(parts: HostParts, made: Made) -> str | None:
    """What of its snapshot is damaged, if the pager ended the VM for that."""
    return await _ask(parts.pager.damage, made)


async def _ask(ask: Callable[[str], Awaitable[str | None]], made: Made) -> str | None:
    if not (made.record.base or made.record.origin):
        return None
    try:
        return await ask(made.record.sandbox_id)
    except PagerError as err:
        log.warning("pager_not_asked", error=str(err))
        return None
