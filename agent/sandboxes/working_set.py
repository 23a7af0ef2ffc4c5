"""What a sandbox touches first after a resume, noted for the next one."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog
import trio

from agent.pager.service import PagerError
from agent.snapshots.layout import WORKING_SET

if TYPE_CHECKING:
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.sandbox import Sandbox
    from agent.snapshots.store import SnapshotStore

log = structlog.get_logger()

FIRST_TOUCHES = 2.0
"""Seconds after a resume that count as its beginning, unless a call was answered before."""


async def record(parts: HostParts, sandbox: Sandbox) -> None:
    """Have the pager note what a restored sandbox has touched once it has answered a call, or a little later."""
    made = sandbox.made
    if not made.record.origin:
        return
    with trio.move_on_after(FIRST_TOUCHES):
        await sandbox.served.wait()
    try:
        await parts.pager.record_working_set(sandbox.id)
        if made.source is not None:
            own, source = UUID(made.record.origin), made.source
            keep = made.golden is not None
            await trio.to_thread.run_sync(lambda: _give_back(parts.snapshots, own, source, keep=keep))
    except (PagerError, OSError) as err:
        log.warning("working_set_not_recorded", error=str(err))


def _give_back(store: SnapshotStore, own: UUID, source: UUID, *, keep: bool) -> None:
    """What the first run of a copy has shown is as good for the next copies.

    `keep`: the source serves everybody, so one sandbox after the other must not change what it has; the first may.
    """
    target = store.snapshot_directory(source)
    if keep and (target / WORKING_SET).exists():
        return
    new = target / f".working-set-{uuid4()}"
    with suppress(FileNotFoundError):  # nothing recorded, or the source was removed since
        os.link(store.snapshot_directory(own) / WORKING_SET, new)
        new.replace(target / WORKING_SET)
