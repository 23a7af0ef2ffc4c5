"""All sandboxes of this host.

Owns: the nursery of sandbox actors, the table of them. Owned by: the daemon's nursery.
Takes: `create`, `destroy`, `find`, `listing`; the table changes without waiting in between.
Emits: a growing `version`, for `host.watch`.
Dies when: the daemon stops. The sandboxes' VMs live on.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from typing import TYPE_CHECKING

import structlog
import trio

from agent.images.errors import ImagesError
from agent.sandboxes.records import Record
from agent.sandboxes.sandbox import Sandbox
from agent.wire.calls import VMM_MEMORY_MB, CreateSandbox, HostListing
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from agent.images.store import Image
    from agent.sandboxes.adoption import Adopted
    from agent.sandboxes.parts import HostParts

log = structlog.get_logger()

DISK_RESERVE_MB = 2048
"""Disk that new sandboxes leave alone: overlays grow, and the host needs some for itself."""

MAX_TOMBSTONES = 4096
"""Ids remembered as ended, so that a create that was held up on the way cannot bring one back."""

MAX_LISTED_ENTRIES = 256
"""Outbox entries in one listing: at most 0.6 MB, so that a long absence of the control plane fits into a frame."""


class Manager:
    """Everything that lives here."""

    def __init__(self, parts: HostParts, *, memory_mb: int) -> None:
        self._parts = parts
        self._memory_mb = memory_mb
        self._sandboxes: dict[str, Sandbox] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._nursery: trio.Nursery | None = None
        self._draining = False
        self.version = 0
        self._changed = trio.Event()

    async def run(
        self, adopted: list[Adopted], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Own the actors, beginning with the adopted ones; until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for one in adopted:
                sandbox = Sandbox(self._parts, one.record, self.changed)
                self._sandboxes[sandbox.id] = sandbox
                nursery.start_soon(self._keep, sandbox, one)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # a create that comes now is refused, not a bug

    async def _keep(self, sandbox: Sandbox, start: Adopted | dict[str, str]) -> None:
        try:
            if isinstance(start, dict):
                await sandbox.run(envs=start)
            else:
                await sandbox.run_adopted(start.vm, start.slot)
        finally:
            # Nobody can have taken its place: `_admit` makes none while the id is in the table.
            del self._sandboxes[sandbox.id]
            if sandbox.ending() or not sandbox.clean:  # one that never ran may be tried again
                self._bury(sandbox.id)
            self.changed()

    async def create(self, request: CreateSandbox) -> Sandbox:
        """The sandbox of this id, newly started unless it is there. Raises Fault without having done anything."""
        existing = self._existing(request.sandbox_id)
        if existing is not None:
            return existing
        try:
            image, free_mb = await trio.to_thread.run_sync(self._look, request.template)
        except ImagesError as err:
            log.warning("image_not_loaded", template=request.template, error=str(err))
            raise Fault(FaultCode.NOT_FOUND, f"this host does not have the template {request.template}") from err
        if free_mb < DISK_RESERVE_MB:
            raise Fault(FaultCode.NO_CAPACITY, f"this host has only {free_mb} MiB of disk left", retryable=True)
        return self._admit(request, image)

    def _look(self, template: str) -> tuple[Image, int]:
        """The image, and how much disk the host has left. Blocks."""
        return self._parts.images.load(template), shutil.disk_usage(self._parts.state.root).free // 2**20

    def _admit(self, request: CreateSandbox, image: Image) -> Sandbox:
        """Without waiting between the questions and the entry in the table: two at once get one sandbox."""
        existing = self._existing(request.sandbox_id)
        if existing is not None:
            return existing
        if self._draining or self._nursery is None:
            raise Fault(FaultCode.DRAINING, "this host takes no new sandboxes", retryable=True)
        taken = sum(sandbox.memory_mb() + VMM_MEMORY_MB for sandbox in self._sandboxes.values())
        if taken + request.memory_mb + VMM_MEMORY_MB > self._memory_mb:
            raise Fault(
                FaultCode.NO_CAPACITY,
                f"{request.memory_mb} MiB do not fit: {taken} of {self._memory_mb} MiB are taken on this host",
                retryable=True,
            )
        sandbox = Sandbox(self._parts, self._record(request, image), self.changed)
        self._sandboxes[sandbox.id] = sandbox
        self._nursery.start_soon(self._keep, sandbox, dict(request.envs))
        self.changed()
        return sandbox

    def _existing(self, sandbox_id: str) -> Sandbox | None:
        """The sandbox if there is one, also when its start is failing: it will say why. Fault once it has ended."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox_id in self._ended or (sandbox is not None and sandbox.ending()):
            raise Fault(FaultCode.INVALID_STATE, "the sandbox has ended")
        return sandbox

    @staticmethod
    def _record(request: CreateSandbox, image: Image) -> Record:
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
        )

    async def destroy(self, sandbox_id: str, *, deadline: float) -> None:
        """End a sandbox and wait until nothing is left; nothing to do for one that is not here."""
        self._bury(sandbox_id)
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is not None:
            await sandbox.destroy().wait(deadline=deadline)

    def _bury(self, sandbox_id: str) -> None:
        self._ended[sandbox_id] = None
        while len(self._ended) > MAX_TOMBSTONES:
            self._ended.popitem(last=False)

    def find(self, sandbox_id: str) -> Sandbox:
        """The sandbox of this id. Fault `not_found` when it does not live here."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise Fault(FaultCode.NOT_FOUND, "this host does not have the sandbox", details={"object": "sandbox"})
        return sandbox

    def listing(self) -> HostListing:
        """What lives here, and what the outbox holds; of very much only the oldest, until it is acknowledged."""
        return HostListing(
            sandboxes=[sandbox.state() for sandbox in self._sandboxes.values()],
            outbox=self._parts.outbox.entries()[:MAX_LISTED_ENTRIES],
        )

    def drain(self) -> None:
        """Take no new sandboxes, and let watchers go."""
        self._draining = True
        self.changed()

    def changed(self) -> None:
        """The listing is different now."""
        self.version += 1
        self._changed.set()
        self._changed = trio.Event()

    async def wait_changed(self, version: int) -> int | None:
        """The version now, as soon as it is not `version`; None when there is nothing more to wait for."""
        while self.version == version and not self._draining:
            await self._changed.wait()
        return None if self._draining else self.version

    def statistics(self) -> dict[str, int]:
        """Sandboxes by status."""
        counts: dict[str, int] = {}
        for sandbox in self._sandboxes.values():
            counts[sandbox.status] = counts.get(sandbox.status, 0) + 1
        return counts
