"""Many generations of a paused sandbox become one, while nobody needs it. Whoever does has us stop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog
import trio

from agent.sandboxes.made import EXPECTED, drop_snapshots, save
from agent.sandboxes.threads import run_stoppable
from agent.snapshots.errors import CompactionStopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.sandboxes.made import Made
    from agent.sandboxes.parts import HostParts

log = structlog.get_logger()

DEEPEST_DISK = 48
"""Layers under a VM's disk: each costs QEMU a megabyte and more, and time to open; with 300 it does not start in
time."""


async def compact_when_due(parts: HostParts, made: Made) -> None:
    """Have a paused sandbox rest as a snapshot of one build and one layer, if its own has many. Raises nothing.

    The commit point is the record that names the new one. Cancelled, it is as before, or done.
    """
    if not made.record.scattered:
        return
    async with parts.compactions:
        try:
            await _compact(parts, made)
        except EXPECTED as err:  # tried again after its next pause, or by the next agent
            log.warning("compaction_failed", error=type(err).__name__, message=str(err))


async def compact_if_too_deep(parts: HostParts, made: Made) -> None:
    """Before a resume: many pauses and resumes in a row leave no time for a compaction in between. Raises nothing."""
    try:
        found = await trio.to_thread.run_sync(parts.snapshots.load, UUID(made.record.base))
    except EXPECTED:
        return  # the resume is about to find out, and says it better
    if len(found.layers) > DEEPEST_DISK:
        await compact_when_due(parts, made)


async def _compact(parts: HostParts, made: Made) -> None:
    old, name = made.record, uuid4()
    try:
        await run_stoppable(partial(_rewrite, parts, made, name), stopped=CompactionStopped)
        used = await trio.to_thread.run_sync(parts.snapshots.allocated_bytes, name)
        await save(parts, made, base=str(name), scattered=False, disk_bytes=used)
    finally:
        # One of the two is nobody's now. What a shield here would hold up is an unlink or two.
        with trio.CancelScope(shield=True):
            await drop_snapshots(parts, {old.base, str(name)} - made.record.snapshots())
    log.info("sandbox_compacted", bytes_before=old.disk_bytes, bytes_after=used)


def _rewrite(parts: HostParts, made: Made, name: UUID, should_stop: Callable[[], bool]) -> None:
    """In a thread; merging layers is a job for the loop."""

    def merge(layers: tuple[Path, ...], target: Path) -> None:
        if should_stop():
            raise CompactionStopped("the compaction of a snapshot was asked to stop")
        trio.from_thread.run(parts.overlays.merge, Path(made.record.rootfs), layers, target)

    parts.snapshots.compact(UUID(made.record.base), name, merge, should_stop=should_stop)
