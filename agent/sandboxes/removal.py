"""Taking down what there is of a sandbox, in the only order that is safe: the VM, its disk, its slot, its directory.

Every step may be repeated, and each begins only when the one before has succeeded: a VM that will not die keeps its
disk and its slot, and the directory goes last, since a restarted agent finds everything from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
import trio

from agent.sandboxes.build import DISK_FILE, save

if TYPE_CHECKING:
    from agent.sandboxes.build import Made
    from agent.sandboxes.parts import HostParts

log = structlog.get_logger()


async def dismantle(parts: HostParts, made: Made, *, settled: bool) -> None:
    """End the VM, remove the disk, give the slot back.

    `settled`: everything has been told, so that a restarted agent need only go on here. Raises the drivers' errors.
    """
    if settled:
        await _note_removal(parts, made)
    directory = parts.state.directory(made.record.sandbox_id)
    if made.vm is not None:
        await made.vm.kill()
        made.vm = None
    else:  # a boot that failed or was given up may have left a process that would not die
        found = await trio.to_thread.run_sync(parts.vms.find_orphans, parts.state.sandboxes)
        if (process := found.get(directory)) is not None:
            await parts.vms.kill_process(process)
    await parts.overlays.remove(directory / DISK_FILE)
    if made.slot is not None:
        parts.slots.release(made.slot)
        made.slot = None


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
