"""What this host is and has, for `host.describe`."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING

import trio

from agent.wire.calls import HostDescription, TemplateDescription

if TYPE_CHECKING:
    from agent.images.store import ImageStore
    from agent.sandboxes.admission import Admission
    from agent.sandboxes.parts import HostParts


async def describe(parts: HostParts, admission: Admission) -> HostDescription:
    """As of now."""
    disk = await trio.to_thread.run_sync(shutil.disk_usage, parts.state.root)
    return HostDescription(
        version=version("capsule"),
        driver=parts.vms.name,
        cpu_cores=os.cpu_count() or 1,
        memory_mb=admission.memory_mb,
        disk_mb=disk.total // 2**20,
        disk_free_mb=disk.free // 2**20,
        templates=await trio.to_thread.run_sync(_templates, parts.images),
    )


def _templates(images: ImageStore) -> list[TemplateDescription]:
    found: list[TemplateDescription] = []
    for image in images.list():
        with suppress(FileNotFoundError):  # collected since it was listed
            found.append(
                TemplateDescription(
                    name=image.name,
                    digest=image.digest,
                    disk_mb=image.disk_mb,
                    size_bytes=image.rootfs.stat().st_blocks * 512,
                    platform=image.platform,
                    created_at=image.created_at.timestamp(),
                )
            )
    return found
