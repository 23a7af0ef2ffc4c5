"""Snapshots whose owner does not know them: made, but not yet noted, when an agent was killed; or replaced since.

What cannot be read belongs to somebody unknown, and stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
import trio

from agent.sandboxes.made import drop_snapshots

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record
    from agent.snapshots.manifest import Manifest

log = structlog.get_logger()


async def collect(parts: HostParts, kept: Mapping[str, Record | None]) -> tuple[list[str], dict[str, Manifest]]:
    """Remove snapshots of sandboxes that do not have them, and what no snapshot needs; what is left, by its kind:
    ids of the named ones, and manifests of the golden ones by their key.

    `kept`: all sandboxes that there are, with their records; None: it may have any of its snapshots.
    """
    named: list[str] = []
    golden: dict[str, Manifest] = {}
    unwanted: set[str] = set()
    for summary in await trio.to_thread.run_sync(parts.snapshots.list):
        manifest, name = summary.manifest, str(summary.id)
        if manifest is None:
            log.error("snapshot_unreadable", snapshot=name, reason=summary.damage)
        elif manifest.kind == "named":
            named.append(name)
        elif manifest.kind == "golden":
            if manifest.owner in golden:
                unwanted.add(str(golden[manifest.owner].id))
            golden[manifest.owner] = manifest  # the newest: they come oldest first
        elif not _belongs(kept, manifest.owner, name):
            unwanted.add(name)
    if unwanted:
        log.info("orphan_snapshots_removed", count=len(unwanted))
    await drop_snapshots(parts, unwanted)
    await trio.to_thread.run_sync(parts.snapshots.collect, ())
    return named, golden


def _belongs(kept: Mapping[str, Record | None], owner: str, name: str) -> bool:
    if owner not in kept:
        return False
    record = kept[owner]
    return record is None or name in record.snapshots()
