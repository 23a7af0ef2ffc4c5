"""The disks of a sandbox's directory: frozen into layers, left behind, and found again after a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import structlog
import trio

from agent.sandboxes.made import save
from agent.storage.overlay import StorageError
from agent.vmm.driver import VmCommandFailed, VmmError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.sandboxes.made import Made
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record
    from agent.snapshots.drafts import Draft

log = structlog.get_logger()


async def freeze_disks(parts: HostParts, record: Record, draft: Draft, names: Sequence[str]) -> list[UUID]:
    """The layers of `draft`, bottom to top: those of its parent, and the disks called `names`."""
    layers: list[UUID] = []
    if record.base:
        layers.extend((await trio.to_thread.run_sync(parts.snapshots.load, UUID(record.base))).manifest.layers)
    directory = parts.state.directory(record.sandbox_id)
    for name in names:
        await parts.overlays.freeze(directory / name, record.disk_mb)
        layers.append(await trio.to_thread.run_sync(draft.add_layer, directory / name))
    return layers


async def remove_disks(parts: HostParts, made: Made, names: Sequence[str]) -> None:
    """Remove disks of the sandbox's directory that are layers by now, or nothing. What does not go is in the way."""
    for name in names:
        try:
            await parts.overlays.remove(parts.state.directory(made.record.sandbox_id) / name)
        except (StorageError, OSError) as err:
            log.warning("disk_not_removed", disk=name, error=str(err))


async def reconcile_disk(parts: HostParts, made: Made) -> None:
    """After a live checkpoint that stopped half-way: ask the VM which disk it writes to, and note it.

    Raises VmmError and OSError; then it is not known, and the record says that.
    """
    record = made.record
    if not record.next_disk:
        return
    assert made.vm is not None  # noqa: S101 - it runs
    found = (await made.vm.disk_file()).name
    if found == record.next_disk:
        await save(parts, made, disk=found, frozen=(*record.frozen, record.disk), next_disk="")
    elif found == record.disk:
        await save(parts, made, next_disk="")
        await remove_disks(parts, made, [record.next_disk])
    else:
        raise VmCommandFailed(f"the VM writes to {found!r}, which is none of its disks")


async def recover_disk(parts: HostParts, made: Made) -> None:
    """For an adopted VM: find out which disk it writes to, and remove those it has left. What fails is tried again."""
    try:
        await reconcile_disk(parts, made)
        await trio.to_thread.run_sync(parts.state.remove_stray_disks, made.record)
    except (VmmError, OSError) as err:
        log.warning("disk_not_known", error=str(err))
