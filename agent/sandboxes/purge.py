"""The command that ends everything of an agent on this machine: VMs, directories, snapshots, slots, the host's routes
and rules.

Only when no agent serves from the state directory. Credentials and outbox stay: the host is still the same host, and
tells the control plane at its next start what became of its sandboxes.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from agent.net.host_network import remove_host_network
from agent.net.threads import run_in_slot_thread
from agent.sandboxes.adoption import end_hidden, end_vm
from agent.sandboxes.records import FIRST_DISK
from agent.sandboxes.removal import disks, forget

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from agent.sandboxes.parts import HostParts

log = structlog.get_logger()


async def purge(parts: HostParts, host_network_file: Path, stop_pager: Callable[[], Awaitable[None]]) -> int:
    """Take down everything; returns how many sandboxes there were. Every slot goes: nobody holds one any more."""
    records = await trio.to_thread.run_sync(parts.state.load)
    processes = await trio.to_thread.run_sync(parts.vms.find_orphans, parts.state.sandboxes)
    for sandbox_id, record in records.items():
        await end_vm(parts, record, processes.pop(parts.state.directory(sandbox_id), None))
    for process in processes.values():
        await parts.vms.kill_process(process)
    await end_hidden(parts, records.keys(), ())
    await stop_pager()
    for sandbox_id, record in records.items():
        for name in [FIRST_DISK] if record is None else disks(record):
            await parts.overlays.remove(parts.state.directory(sandbox_id) / name)
        await parts.outbox.append(sandbox_id, "destroyed", "its host was purged")
        await forget(parts, sandbox_id)
    await trio.to_thread.run_sync(parts.state.forget_snapshots)
    await parts.vms.remove_leftovers()
    for number in sorted(await parts.slot_backend.existing()):
        await parts.slot_backend.remove(number)
    await run_in_slot_thread(partial(remove_host_network, host_network_file))
    log.info("host_purged", sandboxes=len(records))
    return len(records)
