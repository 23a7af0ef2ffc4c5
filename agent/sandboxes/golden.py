"""Golden snapshots: what a boot of an image in one shape ends as, so that a create need not boot.

Made from a scratch VM that never saw a tenant. Each has a key of all that it depends on, so none is ever stale; one
that fits nothing any more is dropped. They are a cache: whatever is missing is made by the next boots.

Owns: the scratch VM of the one that is being made. Owned by: the daemon's nursery. Takes: `find`, for the manager.
Dies when: it is cancelled; a scratch VM is then left to the next agent, which collects it like any half-made sandbox.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import msgspec
import structlog
import trio

from agent.sandboxes.admission import DISK_RESERVE_MB, free_disk_mb
from agent.sandboxes.build import boot
from agent.sandboxes.made import Golden, Made, drop_snapshots
from agent.sandboxes.pausing import freeze
from agent.sandboxes.records import Record
from agent.sandboxes.removal import CLEAN_UP, dismantle, forget
from agent.wire.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from agent.images.store import Image
    from agent.sandboxes.admission import Admission
    from agent.sandboxes.parts import HostParts
    from agent.snapshots.manifest import Manifest

log = structlog.get_logger()

FORMAT = 2
"""Part of every key; raise it when a golden snapshot is made in another way."""

HOSTNAME = "sb-000000000000"
"""Of a scratch VM. As long as a sandbox's own, which a clone's daemon can then write in its place (replace.c)."""

WARM_UP: tuple[dict[str, object], ...] = ({"cmd": "/bin/true", "args": []}, {"cmd": ":"})
"""Run before the freeze: loader, C library and shell are then in the page cache. Else the first process of every clone
reads them from the disk, which takes half as long as its whole start."""
WARM_UP_TIMEOUT = 10.0

LOOK_EVERY = 60.0
"""Seconds between two looks for new images, and tries of what did not work."""
MAX_WANTED = 16
MAX_FAILURES = 3
"""Tries of one golden snapshot in one life of the agent."""


@dataclass(frozen=True, slots=True)
class Shape:
    """vCPUs, and MiB of memory."""

    vcpus: int
    memory_mb: int


class GoldenSnapshots:
    """See the module. `shapes`: those made for every image; others follow their first boot. `limit`: most of all."""

    def __init__(self, parts: HostParts, *, shapes: Iterable[Shape], limit: int) -> None:
        self._parts = parts
        self._shapes = tuple(shapes)
        self._limit = limit
        self._version = version("capsule")
        self._ids: OrderedDict[str, UUID] = OrderedDict()  # least recently used first
        self._wanted: OrderedDict[str, Record] = OrderedDict()
        self._failures: dict[str, int] = {}
        self._forgotten: dict[str, UUID] = {}
        self._unwanted: set[str] = set()
        self._asked = trio.Event()

    def find(self, record: Record) -> Golden | None:
        """What a sandbox of this record can start from; if there is nothing, there will be."""
        key = self._key(record.image_digest, record.vcpus, record.memory_mb)
        found = self._ids.get(key)
        if found is None:
            self._want(key, record)
            return None
        self._ids.move_to_end(key)
        return Golden(found, partial(self._failed, key, found))

    async def run(self, found: Mapping[str, Manifest], admission: Admission) -> None:
        """Make what is wanted, one at a time, until cancelled. `found`: what an earlier agent left."""
        await self._begin(found)
        while True:
            await self._look()
            self._asked = trio.Event()
            unwanted, self._unwanted = self._unwanted, set()
            await drop_snapshots(self._parts, unwanted)
            for key, record in list(self._wanted.items()):
                del self._wanted[key]
                if key not in self._ids and self._failures.get(key, 0) < MAX_FAILURES:
                    await self._try(key, record, admission)
            with trio.move_on_after(LOOK_EVERY):
                await self._asked.wait()

    async def _begin(self, found: Mapping[str, Manifest]) -> None:
        """Keep what fits an image that can be booted now; drop the rest."""
        current = {image.digest for image in await trio.to_thread.run_sync(self._parts.images.list)}
        stale: set[str] = set()
        for key, manifest in found.items():
            fits = key == self._key(manifest.image_digest, manifest.vcpus, manifest.memory_mb)
            if fits and manifest.image_digest in current:
                self._ids[key] = manifest.id
            else:
                stale.add(str(manifest.id))
        await drop_snapshots(self._parts, stale)

    async def _look(self) -> None:
        """Want the usual shapes of all images, and drop what belongs to images that were replaced."""
        for image in await trio.to_thread.run_sync(self._parts.images.list):
            for shape in self._shapes:
                key = self._key(image.digest, shape.vcpus, shape.memory_mb)
                if key not in self._ids:
                    self._want(key, _record(image, shape))

    def _want(self, key: str, record: Record) -> None:
        if len(self._wanted) < MAX_WANTED and key not in self._wanted:
            self._wanted[key] = record
            self._asked.set()

    def _failed(self, key: str, name: UUID) -> None:
        """It is damaged: forget it, and make another, up to MAX_FAILURES. Its files stay for whoever wants to look,
        until the next agent comes or another one of the key is damaged."""
        if self._ids.get(key) != name:
            return
        log.warning("golden_forgotten", golden=str(name))
        del self._ids[key]
        self._failures[key] = self._failures.get(key, 0) + 1
        if key in self._forgotten:
            self._unwanted.add(str(self._forgotten[key]))
            self._asked.set()
        self._forgotten[key] = name

    async def _try(self, key: str, record: Record, admission: Admission) -> None:
        free_mb = await trio.to_thread.run_sync(free_disk_mb, self._parts.state.root)
        with trio.CancelScope() as scope:
            if free_mb < DISK_RESERVE_MB + record.memory_mb or not admission.lend(record.memory_mb, scope.cancel):
                log.info("golden_postponed", template=record.template, free_disk_mb=free_mb)
                return
            made = Made(msgspec.structs.replace(record, sandbox_id=str(uuid4()), phase="making", hostname=HOSTNAME))
            try:
                await self._make(key, made)
            except Exception as err:  # noqa: BLE001 - a boot is what there is without it
                self._failures[key] = self._failures.get(key, 0) + 1
                log.warning("golden_not_made", template=record.template, error=type(err).__name__, message=str(err))
        await self._remove_scratch(made)
        admission.take_back()
        await self._drop_least_used()

    async def _make(self, key: str, made: Made) -> None:
        """Boot, stand still, freeze. Raises the drivers' errors."""
        name = uuid4()
        record = made.record
        async with trio.open_nursery() as nursery:
            failure: Exception | None = None
            try:
                await boot(self._parts, made, envs={}, nursery=nursery)
                await _warm_up(made)
                async with self._parts.captures:
                    await freeze(self._parts, made, name, kind="golden", owner=key)
            except Exception as err:  # noqa: BLE001 - raised below, outside of the nursery's group
                failure = err
            finally:
                made.unlink()
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        self._ids[key] = name
        shape = f"{record.vcpus}x{record.memory_mb}"
        log.info("golden_made", template=record.template, shape=shape, **made.timings_ms)

    async def _remove_scratch(self, made: Made) -> None:
        """What does not go is collected by the next agent."""
        for attempt in range(1, (CLEAN_UP.restarts or 0) + 1):
            try:
                await dismantle(self._parts, made, settled=False)
                await forget(self._parts, made.record.sandbox_id)
            except Exception:
                log.exception("scratch_not_removed", attempt=attempt)
                await trio.sleep(CLEAN_UP.delay(attempt))
            else:
                return

    async def _drop_least_used(self) -> None:
        while len(self._ids) > self._limit:
            _, name = self._ids.popitem(last=False)
            await drop_snapshots(self._parts, {str(name)})

    def _key(self, image_digest: str, vcpus: int, memory_mb: int) -> str:
        """Of all that a golden snapshot depends on; the guest daemon and the kernel are parts of the image."""
        parts = (FORMAT, image_digest, vcpus, memory_mb, self._parts.vms.version(), self._version)
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def no_golden(_record: Record) -> None:
    """Instead of `find`, where every sandbox is to boot."""


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """`1x512,2x1024`: vCPUs x MiB. Raises ValueError."""
    shapes = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        vcpus, _, memory = part.partition("x")
        if not (vcpus.isdecimal() and memory.isdecimal()) or math.prod((int(vcpus), int(memory))) == 0:
            raise ValueError(f"not a shape like 1x512: {part}")
        shapes.append(Shape(int(vcpus), int(memory)))
    return tuple(shapes)


async def _warm_up(made: Made) -> None:
    """Best effort: an image need not have these programs."""
    assert made.guest is not None  # noqa: S101 - it has answered
    try:
        for body in WARM_UP:
            await made.guest.call("exec", body, timeout=WARM_UP_TIMEOUT)
    except Fault as fault:
        log.warning("golden_not_warm", code=fault.code, message=fault.message)


def _record(image: Image, shape: Shape) -> Record:
    return Record(
        sandbox_id="",
        phase="making",
        template=image.name,
        vcpus=shape.vcpus,
        memory_mb=shape.memory_mb,
        disk_mb=image.disk_mb,
        hostname=HOSTNAME,
        kernel=str(image.kernel),
        initramfs=str(image.initramfs),
        rootfs=str(image.rootfs),
        image_digest=image.digest,
    )
