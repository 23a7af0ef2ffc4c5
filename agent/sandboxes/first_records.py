"""What a new sandbox is to be made from: the image or the snapshot that was asked for, looked up and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from agent.images.errors import ImagesError
from agent.sandboxes.admission import check_disk
from agent.sandboxes.made import as_fault, damaged
from agent.sandboxes.records import Record
from agent.snapshots.errors import SnapshotDamaged, SnapshotError
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from agent.sandboxes.parts import HostParts
    from agent.snapshots.manifest import Manifest
    from agent.wire.calls import CreateSandbox

log = structlog.get_logger()


def first_record(parts: HostParts, request: CreateSandbox) -> Record:
    """The record of a sandbox of which nothing exists yet. Blocks. Raises Fault."""
    if request.snapshot_id is not None:
        record = _of_snapshot(parts, request, request.snapshot_id)
    else:
        record = _of_image(parts, request)
    check_disk(parts.state.root)
    return record


def _of_image(parts: HostParts, request: CreateSandbox) -> Record:
    try:
        image = parts.images.load(request.template)
    except ImagesError as err:
        log.warning("image_not_loaded", template=request.template, error=str(err))
        raise Fault(FaultCode.NOT_FOUND, f"this host does not have the template {request.template}") from err
    return Record(
        sandbox_id=request.sandbox_id,
        phase="making",
        template=request.template,
        vcpus=request.vcpus,
        memory_mb=request.memory_mb,
        disk_mb=image.disk_mb,
        hostname=request.hostname,
        kernel=str(image.kernel),
        initramfs=str(image.initramfs),
        rootfs=str(image.rootfs),
        image_digest=image.digest,
        timeout_sec=request.timeout_sec,
    )


def _of_snapshot(parts: HostParts, request: CreateSandbox, snapshot_id: str) -> Record:
    manifest = _manifest(parts, snapshot_id)
    if (request.vcpus, request.memory_mb) != (manifest.vcpus, manifest.memory_mb):
        shape = f"{manifest.vcpus} vCPUs and {manifest.memory_mb} MiB"
        raise Fault(FaultCode.INVALID_ARGUMENT, f"a sandbox of this snapshot has {shape}, no other shape")
    return Record(
        sandbox_id=request.sandbox_id,
        phase="making",
        template=manifest.image_name,
        vcpus=manifest.vcpus,
        memory_mb=manifest.memory_mb,
        disk_mb=manifest.disk_mb,
        hostname=request.hostname,
        kernel=manifest.kernel,
        initramfs=manifest.initramfs,
        rootfs=manifest.rootfs,
        image_digest=manifest.image_digest,
        timeout_sec=request.timeout_sec,
    )


def _manifest(parts: HostParts, snapshot_id: str) -> Manifest:
    try:
        return parts.snapshots.load(UUID(snapshot_id)).manifest
    except SnapshotDamaged as err:
        raise damaged(parts, str(err)) from err
    except SnapshotError as err:
        raise as_fault(err) from err
