"""Taking down what there is of a sandbox, in the only order that is safe: VM and slot, disks, snapshots, record.

Every step may be repeated, and each begins only when the one before has succeeded: a VM that will not die keeps its
disk and its slot, and the directory goes last, since a restarted agent finds everything from there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio

from agent.actor.supervise import RestartPolicy
from agent.sandboxes.made import drop_snapshots, release_vm, save
from agent.sandboxes.records import DISK
from agent.vmm.ownership import give

if TYPE_CHECKING:
    from pathlib import Path

    from agent.sandboxes.made import Made
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record
    from agent.sandboxes.sandbox import Sandbox
    from agent.wire.faults import Fault

log = structlog.get_logger()

CLEAN_UP = RestartPolicy(restarts=8, first_delay=0.2, max_delay=10)
"""How often taking a sandbox down is tried before it is left to the next start of the agent."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sandbox ends: its build failed, its VM died by itself, or (neither is set) on command.

    `damaged`: it died because its memory could not be served; what there is of it stays for whoever wants to look.
    """

    failed: Fault | None = None
    died: str | None = None
    damaged: bool = False


class Removal:
    """Tells first, then removes: an entry for something that is still being removed is true, silence is not."""

    def __init__(self, parts: HostParts, sandbox: Sandbox, ending: Ending) -> None:
        self._parts = parts
        self._sandbox = sandbox
        self._damaged = ending.damaged
        self._news = ending.died

    async def run(self) -> bool:
        """Whether nothing is left. A daemon that stops half-way leaves the rest to the next one."""
        for attempt in range(1, (CLEAN_UP.restarts or 0) + 1):
            try:
                await self._try()
            except Exception:
                log.exception("sandbox_removal_failed", attempt=attempt)
                await trio.sleep(CLEAN_UP.delay(attempt))
            else:
                log.info("sandbox_kept" if self._damaged else "sandbox_removed")
                return True
        return False

    async def _try(self) -> None:
        made = self._sandbox.made
        if self._damaged and made.record.phase != "damaged":
            await save(self._parts, made, phase="damaged")
        try:
            await self._tell()
        except OSError as err:  # a full disk must not protect what fills it; it is told before the last trace goes
            log.warning("outbox_not_written", error=str(err))
        if self._damaged:
            await trio.to_thread.run_sync(seal_disks, self._parts.state.directory(self._sandbox.id))
            await release_vm(self._parts, made)
            await self._tell()
            return
        await dismantle(self._parts, made, settled=self._news is None)
        await self._tell()
        await forget(self._parts, self._sandbox.id)

    async def _tell(self) -> None:
        """Put into the outbox what happened by itself."""
        if self._news is not None:
            await self._parts.outbox.append(self._sandbox.id, "died", self._news)
            self._news = None
            self._sandbox.tell_changed()


async def dismantle(parts: HostParts, made: Made, *, settled: bool) -> None:
    """End the VM, give the slot back, remove disks and snapshots.

    `settled`: everything has been told, so that a restarted agent need only go on here. Raises the drivers' errors.
    """
    if settled:
        await _note_removal(parts, made)
    await release_vm(parts, made)
    directory = parts.state.directory(made.record.sandbox_id)
    for name in disks(made.record):
        await parts.overlays.remove(directory / name)
    await drop_snapshots(parts, made.record.snapshots() | made.replaced)


def disks(record: Record) -> list[str]:
    """Names of all disks that the sandbox may have in its directory."""
    return [name for name in (*record.frozen, record.disk, record.next_disk) if name]


def seal_disks(directory: Path) -> None:
    """Take the disks in a sandbox's directory from its VM's user, who is the slot's next tenant soon. Blocks.

    Raises OSError.
    """
    with suppress(FileNotFoundError):
        for entry in directory.iterdir():
            if DISK.fullmatch(entry.name):
                give(entry, os.geteuid(), os.getegid(), mode=0o400)


async def forget(parts: HostParts, sandbox_id: str) -> None:
    """Remove the directory: the last trace."""
    await trio.to_thread.run_sync(parts.state.forget, sandbox_id)


async def _note_removal(parts: HostParts, made: Made) -> None:
    """Keep a restarted agent from adopting what is being removed. Not needed for more: a full disk is no obstacle."""
    if made.record.phase == "removing":
        return
    try:
        await save(parts, made, phase="removing")
    except OSError as err:
        log.warning("removal_not_noted", error=str(err))
