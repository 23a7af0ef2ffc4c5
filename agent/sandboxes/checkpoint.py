"""A live checkpoint: a running sandbox's state becomes its new base, while it stands still for as little as possible.

Only the disk's pivot, the device state and a copy of the dirty pages are taken from the standing VM. What a crash may
leave in doubt is noted before: `next_disk` (which disk does it write to?) and `untracked` (since when does the kernel
count dirty pages?). The commit point is the record that names the new base.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog
import trio

from agent.sandboxes import capturing
from agent.sandboxes.compaction import DEEPEST_DISK
from agent.sandboxes.disks import freeze_disks, reconcile_disk, recover_disk, remove_disks
from agent.sandboxes.greeting import settle
from agent.sandboxes.made import drop_snapshots, save
from agent.sandboxes.pausing import RUN_ON_TIMEOUT, pause_fault, publish, run_on, wake
from agent.sandboxes.threads import in_thread, run_stoppable
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from agent.sandboxes.made import Made
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record
    from agent.snapshots.drafts import Draft

log = structlog.get_logger()


async def checkpoint(parts: HostParts, made: Made) -> None:
    """Make the state of this moment the sandbox's base. Raises Fault: it runs on, with the base it had.

    Cancelled, likewise; unless the record was written already.
    """
    made.timings_ms = {}
    with made.step("queue"):
        await parts.captures.acquire()
    name = uuid4()
    try:
        await _check_depth(parts, made.record)
        await reconcile_disk(parts, made)
        before = made.record
        await save(parts, made, next_disk=before.disk_after(), untracked=True)
        figures = await _take(parts, made, name, before)
        with made.step("commit"):
            current = made.record.next_disk
            changes = {"base": str(name), "disk": current, "frozen": (), "next_disk": "", "untracked": False}
            await save(parts, made, **figures, **changes)
    except Exception as err:
        raise pause_fault(parts, err) from err
    finally:
        if made.record.base != str(name):
            with trio.move_on_after(RUN_ON_TIMEOUT, shield=True):
                await run_on(parts, made, unwanted=name)
                await recover_disk(parts, made)
        parts.captures.release()
    # The pager serves the VM from the snapshot that it was restored from, which must stay as long as the VM does.
    await drop_snapshots(parts, before.snapshots() - made.record.snapshots())
    await remove_disks(parts, made, (*before.frozen, before.disk))


async def _check_depth(parts: HostParts, record: Record) -> None:
    """Fault `conflict`: each checkpoint puts a layer under a disk that a running VM cannot merge."""
    layers = len(record.frozen)
    if record.base:
        layers += len((await trio.to_thread.run_sync(parts.snapshots.load, UUID(record.base))).layers)
    if layers >= DEEPEST_DISK:
        message = f"the sandbox was frozen {layers} times while it ran; pause and resume it, then try again"
        raise Fault(FaultCode.CONFLICT, message)


async def _take(parts: HostParts, made: Made, name: UUID, before: Record) -> dict[str, object]:
    """Publish the snapshot and return what the record says of it; the VM runs again by then.

    `before`: the record without this checkpoint's notes. What the kernel counts is good until `grab` resets it.
    """
    record, vm = made.record, made.vm
    assert vm is not None  # noqa: S101 - it runs
    directory = parts.state.directory(record.sandbox_id)
    with made.step("overlay"):
        await _make_overlay(parts, made)
    async with (
        in_thread(lambda: parts.snapshots.draft(name)) as draft,
        in_thread(lambda: capturing.open_source(parts, vm, before)) as source,
    ):
        grabbed = await _stop_shortly(made, directory / record.next_disk, draft, source)
        with grabbed.file, made.step("memory"):
            work = partial(source.capture_grabbed, draft, grabbed)
            await run_stoppable(work, stopped=capturing.CaptureStopped)
        with made.step("disk"):
            layers = await freeze_disks(parts, record, draft, (*record.frozen, record.disk))
        with made.step("publish"):
            return await trio.to_thread.run_sync(publish, parts, record, draft, layers)


async def _make_overlay(parts: HostParts, made: Made) -> None:
    """The disk that the VM will write to from now on, on top of the one it has."""
    record, layers = made.record, list[Path]()
    if record.base:
        layers.extend((await trio.to_thread.run_sync(parts.snapshots.load, UUID(record.base))).layers)
    directory = parts.state.directory(record.sandbox_id)
    layers.extend(directory / name for name in (*record.frozen, record.disk))
    target = directory / record.next_disk
    await parts.overlays.remove(target)
    await parts.overlays.create(Path(record.rootfs), target, record.disk_mb, layers=layers)


async def _stop_shortly(made: Made, overlay: Path, draft: Draft, source: capturing.Source) -> capturing.Grabbed:
    """Take what can only be taken while the vCPUs stand; returns the copy of the memory, to be closed."""
    assert made.vm is not None  # noqa: S101 - it runs
    if made.guest is not None:
        with made.step("settle"):
            made.settled = True
            await settle(made.guest)
    made.stopped_at = time.perf_counter()
    await made.vm.pause()
    with made.step("pivot"):
        await made.vm.pivot_disk(overlay)
    with made.step("state"):
        await made.vm.save_state(draft.state_path, sync=False)  # publish does that
    with made.step("grab"):
        grabbed = await trio.to_thread.run_sync(source.grab, overlay.parent)
    try:
        await _go_on(made)
    except BaseException:
        grabbed.file.close()
        raise
    return grabbed


async def _go_on(made: Made) -> None:
    """As `wake`, in bounded time: others wait for the permit that we have. Raises Fault, and the VM is told again."""
    with trio.move_on_after(RUN_ON_TIMEOUT):
        await wake(made)
    if made.stopped_at:
        raise Fault(FaultCode.INTERNAL, "the VM does not go on yet; it is told again", retryable=True)
