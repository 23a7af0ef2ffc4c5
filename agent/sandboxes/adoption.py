"""What a starting agent does with what an earlier one left: adopt VMs that run, let paused ones rest, remove others.

An earlier agent may have been killed between any two steps. The order here: processes first (they hold disks and taps),
then directories, then snapshots that no record names; slots that no adopted sandbox holds are removed by the slot pool
when it starts.
"""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from agent.net.addresses import FIRST_SLOT, LAST_SLOT
from agent.pager.service import PagerError
from agent.sandboxes import orphans
from agent.sandboxes.made import EXPECTED, release_pager, spec, without_paths
from agent.sandboxes.records import RECORD_FILE
from agent.sandboxes.removal import disks, forget, seal_disks
from agent.vmm.driver import Vm, VmmError, VmProcess

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from agent.net.ledger import Slot
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record
    from agent.snapshots.manifest import Manifest

log = structlog.get_logger()

SLOT_NUMBERS = range(FIRST_SLOT, LAST_SLOT + 1)


class StateDirectoryInUse(Exception):  # noqa: N818 - reads as what happened
    """Another agent serves from this state directory."""


@dataclass(frozen=True)
class Running:
    """A sandbox whose VM runs on."""

    record: Record
    vm: Vm
    slot: Slot


@dataclass
class Found:
    """What an earlier agent left. `named`: ids of snapshots. `golden`: manifests of those, by their key."""

    running: list[Running] = field(default_factory=list)
    resting: list[Record] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    golden: dict[str, Manifest] = field(default_factory=dict)


def lock_state_directory(root: Path) -> int:
    """Take the lock that makes us the only agent here; held until the process ends. Raises StateDirectoryInUse."""
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(fd)
        raise StateDirectoryInUse(f"another agent serves from {root}") from err
    return fd


async def adopt_all(parts: HostParts) -> Found:
    """Adopt and collect; afterwards disk and process table hold what the result says, and what would not go.

    The latter keeps its slot and is tried again at the next start: one VM that hangs in the kernel, or a disk that
    fails, must not keep the agent from its other VMs.
    """
    began = time.perf_counter()
    await trio.to_thread.run_sync(parts.snapshots.prepare)
    records = await trio.to_thread.run_sync(parts.state.load)
    processes = await trio.to_thread.run_sync(parts.vms.find_orphans, parts.state.sandboxes)
    adoption = _Adoption(parts)
    for sandbox_id, record in records.items():
        await adoption.take(sandbox_id, record, processes.pop(parts.state.directory(sandbox_id), None))
    for directory, process in processes.items():
        await _kill_stray(parts, directory, process)
    adoption.stuck |= await end_hidden(parts, records.keys(), adoption.alive.keys())
    await parts.vms.remove_leftovers()
    leases = parts.slots.adopt(number for number in adoption.alive.keys() | adoption.stuck if number in SLOT_NUMBERS)
    found = adoption.found
    found.running = [Running(record, vm, leases[number]) for number, (record, vm) in adoption.alive.items()]
    found.named, found.golden = await orphans.collect(parts, adoption.kept)
    seconds = round(time.perf_counter() - began, 3)
    log.info("adoption_done", running=len(found.running), paused=len(found.resting), of=len(records), seconds=seconds)
    return found


class _Adoption:
    """Sandbox by sandbox. `kept`: the records that stay; None for one that cannot be read."""

    def __init__(self, parts: HostParts) -> None:
        self.found = Found()
        self.alive: dict[int, tuple[Record, Vm]] = {}
        self.stuck: set[int] = set()
        self.kept: dict[str, Record | None] = {}
        self._parts = parts

    async def take(self, sandbox_id: str, record: Record | None, process: VmProcess | None) -> None:
        """Decide about one sandbox."""
        if record is None and await trio.to_thread.run_sync(self._is_paused_perhaps, sandbox_id):
            log.error("sandbox_kept_for_inspection", sandbox_id=sandbox_id, reason="its record cannot be read")
            self.kept[sandbox_id] = None
            await self._end(sandbox_id, None, process)
            await self._seal(sandbox_id)
        elif record is not None and record.phase in {"paused", "damaged"}:
            await self._keep(record, process)
        elif (
            (vm := await _adopt(self._parts, record, process)) and record is not None and record.slot not in self.alive
        ):
            self.alive[record.slot] = (record, vm)
            self.kept[sandbox_id] = record
        elif record is not None and await self._keep_damaged(record):
            await self._keep(self.kept[sandbox_id] or record, process)
        elif not await _collect(self._parts, sandbox_id, record, process) and record is not None:
            self.stuck.add(record.slot)
            self.kept[sandbox_id] = record

    def _is_paused_perhaps(self, sandbox_id: str) -> bool:
        """Whether a sandbox without a readable record has a snapshot. Blocks."""
        if not (self._parts.state.directory(sandbox_id) / RECORD_FILE).exists():
            return False  # it goes first: what is left is rubbish
        manifests = (summary.manifest for summary in self._parts.snapshots.list())
        return any(one is not None and one.owner == sandbox_id for one in manifests)

    async def _keep(self, record: Record, process: VmProcess | None) -> None:
        """Of a sandbox without a VM nothing is left but its record and its snapshot."""
        self.kept[record.sandbox_id] = record
        ended = await self._end(record.sandbox_id, record, process)
        if not ended:
            self.stuck.add(record.slot)
        if record.phase == "damaged":
            if not await self._seal(record.sandbox_id):
                self.stuck.add(record.slot)
            log.warning("damaged_sandbox_kept", directory=str(self._parts.state.directory(record.sandbox_id)))
            return
        if process is not None:  # of others that have gone the pager has seen it
            await release_pager(self._parts, record.sandbox_id)
        if ended:
            try:
                await trio.to_thread.run_sync(self._parts.state.tidy, record)
            except OSError as err:
                log.warning("directory_not_tidied", sandbox_id=record.sandbox_id, error=str(err))
        self.found.resting.append(record)

    async def _end(self, sandbox_id: str, record: Record | None, process: VmProcess | None) -> bool:
        try:
            await end_vm(self._parts, record, process)
        except VmmError as err:
            log.error("leftover_not_collected", sandbox_id=sandbox_id, error=str(err))  # noqa: TRY400
            return False
        return True

    async def _seal(self, sandbox_id: str) -> bool:
        """Whether its disks, which stay, are nobody's who may get its slot."""
        try:
            await trio.to_thread.run_sync(seal_disks, self._parts.state.directory(sandbox_id))
        except OSError as err:
            log.error("kept_disk_not_sealed", sandbox_id=sandbox_id, error=str(err))  # noqa: TRY400
            return False
        return True

    async def _keep_damaged(self, record: Record) -> bool:
        """Whether the pager has ended its VM, whose memory it could not serve, while no agent was there."""
        if record.phase != "running" or not record.origin:
            return False
        try:
            reason = await self._parts.pager.damage(record.sandbox_id)
            if reason is None:
                return False
            damaged = msgspec.structs.replace(record, phase="damaged")
            await self._parts.outbox.append(record.sandbox_id, "died", without_paths(self._parts, reason))
            await trio.to_thread.run_sync(self._parts.state.save, damaged)
            await release_pager(self._parts, record.sandbox_id)
        except (PagerError, OSError) as err:
            log.warning("paging_failure_not_noted", sandbox_id=record.sandbox_id, error=str(err))
            return False
        self.kept[record.sandbox_id] = damaged
        return True


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
        await end_vm(parts, record, process)
        if process is not None or (record is not None and record.snapshots()):
            await release_pager(parts, sandbox_id)  # it may still listen for a VMM that never came
        if record is not None:
            for name in disks(record):
                await parts.overlays.remove(parts.state.directory(sandbox_id) / name)
            if record.phase == "running":
                await parts.outbox.append(sandbox_id, "died", "its VM was gone when the host's agent came back")
        await forget(parts, sandbox_id)
    except EXPECTED as err:
        log.error("leftover_not_collected", sandbox_id=sandbox_id, error=str(err))  # noqa: TRY400
        return False
    return True


async def end_vm(parts: HostParts, record: Record | None, process: VmProcess | None) -> None:
    """End a sandbox's VM: the process that looks like it, and the one that was noted. Raises VmmError.

    Two, as a VMM that its guest has taken over can look like anything, and a note may not have been written.
    """
    recorded = None if record is None else record.process
    if recorded is not None:
        await parts.vms.kill_process(VmProcess(recorded.pid, recorded.start_time))
    if process is not None:
        await parts.vms.kill_process(process)


async def end_hidden(parts: HostParts, known: Collection[str], alive: Collection[int]) -> set[int]:
    """End what still runs as the user of a slot that no adopted VM has; returns slots whose user is not free yet.

    The next tenant of such a slot would be the same user, and so be at the mercy of what is there.
    """
    users = {parts.uid_base + number for number in SLOT_NUMBERS if number not in alive}
    busy = {user - parts.uid_base for user in await parts.vms.end_users(users, known)}
    if busy:
        log.error("slots_withheld", slots=sorted(busy), reason="processes run as their users; end them, then restart")
    return busy


async def _kill_stray(parts: HostParts, directory: Path, process: VmProcess) -> None:
    """End a VM whose directory has gone."""
    try:
        await parts.vms.kill_process(process)
    except VmmError as err:
        log.error("stray_vm_not_killed", directory=str(directory), pid=process.pid, error=str(err))  # noqa: TRY400
    else:
        log.warning("stray_vm_killed", directory=str(directory), pid=process.pid)
