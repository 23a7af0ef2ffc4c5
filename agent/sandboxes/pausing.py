"""Pausing: a running sandbox becomes a snapshot of its own, and its VM goes.

The commit point is the record that says `paused`. Until then everything made is dropped and the VM runs on as if
nothing had happened, also when a restarted agent finds it half-way; from then on what is left of the VM is removed.
Nothing that the new snapshot replaces is touched before.
"""

from __future__ import annotations

import itertools
import shutil
import time
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog
import trio

from agent.actor.supervise import RestartPolicy
from agent.sandboxes import capturing
from agent.sandboxes.disks import freeze_disks, reconcile_disk
from agent.sandboxes.greeting import THAW_TIMEOUT, settle, thaw
from agent.sandboxes.made import as_fault, damaged, disk_is_full, drop_snapshots, milliseconds_since, release_vm, save
from agent.sandboxes.threads import in_thread, run_stoppable
from agent.snapshots.errors import SnapshotDamaged
from agent.snapshots.manifest import Description
from agent.vmm.driver import VmGone, VmmError
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from agent.sandboxes.made import Made
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record
    from agent.snapshots.drafts import Draft
    from agent.snapshots.manifest import Kind

log = structlog.get_logger()

WAKE = RestartPolicy(first_delay=0.1, max_delay=5)
"""How often a VM that does not take its command to go on is told again."""
WAKE_PATIENCE = 60.0
"""Seconds to try to thaw a guest in the background; by then it has thawed by itself."""
RUN_ON_TIMEOUT = 10.0
"""Seconds that bringing a VM back may hold up whoever gave its pause up; it goes on in the background."""
MAX_LAYERS = 12
"""Disk layers above which a paused sandbox's are merged; every cold read of the guest looks through all of them."""
LEAVE = RestartPolicy(restarts=5, first_delay=0.2, max_delay=2)


async def pause(parts: HostParts, made: Made, *, untold: str = "") -> None:
    """Freeze the sandbox: when this returns, its record says `paused`. Raises Fault: it runs on, as before.

    Cancelled, likewise; unless the record was written already. `untold`: see Record.
    """
    made.timings_ms = {}
    with made.step("queue"):
        await parts.captures.acquire()
    name = uuid4()
    try:
        await reconcile_disk(parts, made)
        figures = await freeze(parts, made, name)
        made.replaced = made.record.snapshots()
        changes = {"base": str(name), "origin": "", "frozen": (), "untracked": False, "process": None}
        with made.step("commit"):
            await save(parts, made, phase="paused", untold=untold, **figures, **changes)
    except Exception as err:
        raise pause_fault(parts, err) from err
    finally:
        if made.record.phase != "paused":
            with trio.move_on_after(RUN_ON_TIMEOUT, shield=True):
                await run_on(parts, made, unwanted=name)
        parts.captures.release()


async def freeze(
    parts: HostParts, made: Made, name: UUID, *, kind: Kind = "sandbox", owner: str = ""
) -> dict[str, object]:
    """Publish a snapshot and return what the record says of it; the vCPUs stand from here on.

    `kind`, `owner`: by default the sandbox's own.
    """
    vm, record = made.vm, made.record
    assert vm is not None  # noqa: S101 - it runs
    if made.guest is not None:
        with made.step("settle"):
            made.settled = True
            await settle(made.guest)
    with made.step("stop"):
        made.stopped_at = time.perf_counter()
        await vm.pause()
    async with in_thread(lambda: parts.snapshots.draft(name)) as draft:
        with made.step("state"):
            await vm.save_state(draft.state_path, sync=False)  # publish does that
        with made.step("memory"):
            async with in_thread(lambda: capturing.open_source(parts, vm, record)) as source:
                await run_stoppable(
                    lambda should_stop: source.capture(draft, should_stop), stopped=capturing.CaptureStopped
                )
        with made.step("disk"):
            layers = await freeze_disks(parts, record, draft, (*record.frozen, record.disk))
        with made.step("publish"):
            give_name = partial(publish, parts, record, draft, layers, kind=kind, owner=owner)
            return await trio.to_thread.run_sync(give_name)


def publish(
    parts: HostParts, record: Record, draft: Draft, layers: Sequence[UUID], *, kind: Kind = "sandbox", owner: str = ""
) -> dict[str, object]:
    """Give the snapshot its name; returns what the record says of it. What is known of the working set goes with it.

    Blocks.
    """
    if record.base:
        _keep_working_set(parts.snapshots.snapshot_directory(UUID(record.origin or record.base)), draft)
    snapshot = draft.publish(
        Description(
            kind=kind,
            owner=owner or record.sandbox_id,
            image_name=record.template,
            image_digest=record.image_digest,
            kernel=record.kernel,
            initramfs=record.initramfs,
            rootfs=record.rootfs,
            vcpus=record.vcpus,
            memory_mb=record.memory_mb,
            disk_mb=record.disk_mb,
            vmm=parts.vms.version(),
        ),
        layers,
    )
    scattered = snapshot.wants_compaction(parts.compact_generations) or len(layers) > MAX_LAYERS
    return {"disk_bytes": parts.snapshots.allocated_bytes(snapshot.id), "scattered": scattered}


def _keep_working_set(before: Path, draft: Draft) -> None:
    source = before / draft.working_set.name
    if source.exists():
        shutil.copyfile(source, draft.working_set)


async def run_on(parts: HostParts, made: Made, *, unwanted: UUID) -> None:
    """Let the VM go on after a snapshot that was not to be, and remove what was published of that.

    Also when we are cancelled, so shielded: a guest must not stand still until the next agent comes.
    """
    await wake(made, patience=0)
    try:
        if await trio.to_thread.run_sync(parts.state.read, made.record.sandbox_id) != made.record:
            log.error("record_is_another")  # it may name what we were about to remove
            return
    except OSError as err:
        log.warning("record_not_read", error=str(err))
        return
    await drop_snapshots(parts, {str(unwanted)})


async def wake(made: Made, *, patience: float = THAW_TIMEOUT) -> None:
    """Have vCPUs and processes of the guest go on, however often the VM must be told. Harmless if they do.

    Never beside a pause or a checkpoint. `patience`: seconds to wait for a connection to the guest.
    """
    vm = made.vm
    for attempt in itertools.count(1):
        if vm is None:
            return
        try:
            await vm.resume()
        except VmGone:
            return  # noticed, and told, by whoever watches it
        except VmmError as err:
            log.warning("vm_not_resumed", attempt=attempt, error=str(err))
            await trio.sleep(WAKE.delay(attempt))
        else:
            break
    if made.stopped_at:
        made.timings_ms["stopped_ms"] = milliseconds_since(made.stopped_at)
        made.stopped_at = 0.0
    if made.guest is not None and made.settled:
        made.settled = not await thaw(made.guest, patience=patience)


async def leave(parts: HostParts, made: Made, *, hurry: trio.Event) -> None:
    """After the commit: end the VM, give back what it held, remove what the new snapshot has replaced.

    What does not go now is tried again by the next resume, removal, or start of the agent. `hurry`: try once only.
    """
    for attempt in range(1, (LEAVE.restarts or 0) + 1):
        try:
            with made.step("end"):
                await release_vm(parts, made)
                await trio.to_thread.run_sync(parts.state.tidy, made.record)
            break
        except (VmmError, OSError) as err:
            log.error("paused_vm_not_ended", attempt=attempt, error=str(err))  # noqa: TRY400 - the error says it
            with trio.move_on_after(LEAVE.delay(attempt)):
                await hurry.wait()
    if made.stopped_at:
        made.timings_ms["stopped_ms"] = milliseconds_since(made.stopped_at)
        made.stopped_at = 0.0
    made.settled = False
    await drop_snapshots(parts, made.replaced - made.record.snapshots())
    made.replaced = set()


def pause_fault(parts: HostParts, err: Exception) -> Fault:
    """A failed pause or checkpoint in the words of the wire."""
    if isinstance(err, Fault):
        return err
    if disk_is_full(err):
        log.warning("sandbox_step_failed", error=type(err).__name__, message=str(err))
        return Fault(FaultCode.DISK_FULL, "the host's disk is full; the sandbox runs on", retryable=True)
    if isinstance(err, SnapshotDamaged):
        return damaged(parts, str(err))
    return as_fault(err, task="freeze the sandbox; it runs on")
