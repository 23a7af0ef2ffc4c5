"""What exists of one sandbox, noted step by step, and the failures of its drivers in the words of the wire.

What each step made is noted in `Made` at once, so that whoever takes the sandbox down, or a step back, knows what
there is, however far somebody came.
"""

from __future__ import annotations

import errno
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec
import structlog
import trio

from agent.net.addresses import GUEST_MAC
from agent.net.errors import NetworkError, NoFreeSlots
from agent.pager.service import PagerError, SnapshotNotOpened
from agent.snapshots import errors as snapshots
from agent.storage.overlay import HostDiskFull, StorageError
from agent.vmm.driver import Vm, VmDiskFull, VmmError, VmSpec
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from agent.guest.driver import Guest
    from agent.net.ledger import Slot
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record

log = structlog.get_logger()

SLOW_STEP_MS = 1000
"""A step of a start, pause or resume that took longer is worth a line of its own in the log."""

EXPECTED = (NetworkError, StorageError, VmmError, OSError, snapshots.SnapshotError, PagerError)
"""Failures of the host that are no bugs of ours: logged without a traceback."""

HOST_PATH = re.compile(r"(?<![\w.])(?:/[\w.@+-]+){2,}/?")
"""A path of the host. Users see why their sandbox died, and have no business with our directories."""


@dataclass(frozen=True, slots=True)
class Golden:
    """A golden snapshot that a sandbox may start from; `failed` is called when that does not work."""

    id: UUID
    failed: Callable[[], None]


@dataclass
class Made:
    """What exists of a sandbox on this host.

    `link`: ends the guest link's task. `source`: the snapshot that its first memory is a copy of,
    `golden` if it is one of those. `stopped_at`: since
    when its vCPUs stand (performance counter), 0 while they run. `settled`: its
    guest's processes stand still, too, or may do so. `replaced`: snapshots that its last one has replaced.
    `saving`: held by whoever changes the record.
    """

    record: Record
    saving: trio.Lock = field(default_factory=trio.Lock)
    slot: Slot | None = None
    vm: Vm | None = None
    guest: Guest | None = None
    link: trio.CancelScope | None = None
    source: UUID | None = None
    golden: Golden | None = None
    stopped_at: float = 0.0
    settled: bool = False
    replaced: set[str] = field(default_factory=set)
    timings_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step."""
        began = time.perf_counter()
        yield
        took = self.timings_ms[name] = milliseconds_since(began)
        if took > SLOW_STEP_MS:
            log.info("slow_step", step=name, milliseconds=took)

    def unlink(self) -> None:
        """Let the guest go."""
        self.guest = None
        if self.link is not None:
            self.link.cancel()
            self.link = None


def milliseconds_since(began: float) -> float:
    """Of the performance counter."""
    return round((time.perf_counter() - began) * 1000, 1)


async def save(parts: HostParts, made: Made, **changes: object) -> None:
    """Change the record, on disk first. Raises OSError, and then both are as before.

    What lies on the disk decides, as it would for a restarted agent: a replaced file whose directory could not be
    synced has been replaced.
    """
    async with made.saving:  # what rests is told and compacted at once, and each must see what the other has noted
        record = msgspec.structs.replace(made.record, **changes)
        failure: OSError | None = None
        try:
            await trio.to_thread.run_sync(parts.state.save, record)
        except OSError as err:
            failure = err
        if failure is not None:
            with trio.CancelScope(shield=True):  # a small file; without it nobody knows which of the two it is
                found = await trio.to_thread.run_sync(parts.state.read, record.sandbox_id)
            if found != record:
                raise failure
            log.warning("record_not_synced", error=str(failure))
        made.record = record


async def release_vm(parts: HostParts, made: Made) -> None:
    """End the VM, let the pager forget it, give the slot back; what has gone already is no obstacle.

    Each step begins only when the one before has succeeded: a VM that will not die keeps its slot. Raises VmmError.
    """
    made.unlink()
    directory = parts.state.directory(made.record.sandbox_id)
    if made.vm is not None:
        await made.vm.kill()
        made.vm = None
    else:  # a start that failed or was given up may have left a process that would not die
        found = await trio.to_thread.run_sync(parts.vms.find_orphans, parts.state.sandboxes)
        if (process := found.get(directory)) is not None:
            await parts.vms.kill_process(process)
    if made.record.snapshots():  # else the pager has never heard of it
        await release_pager(parts, made.record.sandbox_id)
    if made.slot is not None:
        parts.slots.release(made.slot)
        made.slot = None


async def release_pager(parts: HostParts, sandbox_id: str) -> None:
    """Let the pager forget a VM that has gone. One that does not answer sees by itself that it has gone."""
    try:
        figures = await parts.pager.release(sandbox_id)
    except PagerError as err:
        log.warning("pager_not_told", error=str(err))
    else:
        if figures is not None and figures.faults:
            log.info("pages_served", faults=figures.faults, prefetched=figures.prefetched_bytes)


async def drop_snapshots(parts: HostParts, names: set[str]) -> None:
    """Remove snapshots that nobody needs any more. What cannot be removed is found by the next start of the agent."""
    for name in sorted(names):
        try:
            await trio.to_thread.run_sync(parts.snapshots.remove, UUID(name))
        except (snapshots.SnapshotError, OSError) as err:
            log.warning("snapshot_not_removed", snapshot=name, error=str(err))


def spec(parts: HostParts, record: Record, *, tap_fd: int, layers: Sequence[Path] = ()) -> VmSpec:
    """The VM of a record. Each slot has a user of its own, so one VMM cannot touch another's files or process."""
    directory = parts.state.directory(record.sandbox_id)
    return VmSpec(
        sandbox_id=record.sandbox_id,
        directory=directory,
        vcpus=record.vcpus,
        memory_mb=record.memory_mb,
        kernel=Path(record.kernel),
        initramfs=Path(record.initramfs),
        base=Path(record.rootfs),
        layers=tuple(layers),
        disk=directory / record.disk,
        disk_format="qcow2",
        tap_fd=tap_fd,
        mac=GUEST_MAC,
        uid=parts.uid_base + record.slot,
        gid=parts.uid_base + record.slot,
        network_namespace=parts.slot_backend.namespace(record.slot),
    )


def disk_is_full(err: BaseException) -> bool:
    """Whether the host's disk, or its quota, is what failed."""
    match err:
        case HostDiskFull() | VmDiskFull() | snapshots.HostDiskFull():
            return True
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return True
    return False


def as_fault(err: Exception, *, task: str = "start the sandbox") -> Fault:
    """A driver's failure in the words of the wire. The message names no path of the host."""
    match err:
        case NoFreeSlots():
            fault = Fault(FaultCode.NO_CAPACITY, "this host has no free network slot", retryable=True)
        case _ if disk_is_full(err):
            fault = Fault(FaultCode.NO_CAPACITY, "this host's disk is full", retryable=True)
        case SnapshotNotOpened():
            fault = Fault(
                FaultCode.BUSY, "this host could not open the snapshot; try again in a moment", retryable=True
            )
        case snapshots.SnapshotMissing():
            what = "this host does not have the snapshot"
            fault = Fault(FaultCode.NOT_FOUND, what, details={"object": "snapshot"})
        case _:
            what = type(err).__name__
            fault = Fault(FaultCode.INTERNAL, f"the host could not {task} ({what})", retryable=True)
    expected = isinstance(err, EXPECTED)
    log.warning("sandbox_step_failed", error=type(err).__name__, message=str(err), exc_info=None if expected else err)
    return fault


def damaged(parts: HostParts, reason: str) -> Fault:
    """A snapshot that cannot be used, with the file's name as the store knows it."""
    log.error("snapshot_damaged", reason=reason, store=str(parts.state.snapshots))
    return Fault(FaultCode.SNAPSHOT_DAMAGED, f"the snapshot is damaged: {without_paths(parts, reason)}")


def without_paths(parts: HostParts, text: str) -> str:
    """`text` with the store's files named as the store knows them, and without other paths of the host."""
    return HOST_PATH.sub("…", text.replace(f"{parts.state.snapshots}/", ""))
