"""The snapshots that `snapshot.create` made: they belong to nobody, and stay until `snapshot.remove`."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING
from uuid import UUID

import structlog
import trio

from agent.sandboxes.admission import check_disk
from agent.sandboxes.pausing import pause_fault
from agent.wire.calls import SnapshotState
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.actor.mailbox import ReplySlot
    from agent.sandboxes.commands import Checkpoint
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record
    from agent.sandboxes.sandbox import Sandbox
    from agent.snapshots.manifest import Manifest

log = structlog.get_logger()

MAX_TOMBSTONES = 4096
"""Ids remembered as removed, so that a create that was held up on the way cannot bring one back."""

MAX_NAMED = 8192
"""Snapshots of one host: their ids fit into one listing three times over."""


class NamedSnapshots:
    """All of them on this host. The table changes without waiting in between."""

    def __init__(self, parts: HostParts, changed: Callable[[], None]) -> None:
        self._parts = parts
        self._changed = changed
        self._ids: set[str] = set()
        self._making: dict[str, ReplySlot[SnapshotState]] = {}
        self._removed: OrderedDict[str, None] = OrderedDict()

    def begin(self, ids: Iterable[str]) -> None:
        """Those that an earlier agent left."""
        self._ids.update(ids)

    def ids(self) -> list[str]:
        """All, sorted."""
        return sorted(self._ids)

    async def create(self, snapshot_id: str, find: Callable[[], Sandbox], *, deadline: float) -> SnapshotState:
        """A snapshot of the sandbox; the one that is there, or being made, under this id. Raises Fault."""
        if snapshot_id not in self._ids and snapshot_id not in self._making:
            await self._check_room()
        if snapshot_id in self._removed:
            raise _was_removed()
        if snapshot_id in self._ids:
            return await self._tell_again(snapshot_id)
        slot = self._making.get(snapshot_id)
        if slot is None or slot.answered():
            slot = self._making[snapshot_id] = find().checkpoint(snapshot_id)
        try:
            return await slot.wait(deadline=deadline)
        finally:
            if slot.answered() and self._making.get(snapshot_id) is slot:
                del self._making[snapshot_id]

    async def _tell_again(self, snapshot_id: str) -> SnapshotState:
        """What was made before. Raises Fault, also when it is taken back meanwhile: who asks would count on it."""
        failure: Fault | None = None
        try:
            state = await self.describe(snapshot_id)
        except Fault as fault:
            failure = fault
        if snapshot_id in self._removed:
            raise _was_removed() from failure
        if failure is not None:
            raise failure
        return state

    async def _check_room(self) -> None:
        """Fault `no_capacity`: what templates take must not be what a pause or an overlay needs next."""
        # Who asked for it may have gone away before the answer.
        self._making = {one: slot for one, slot in self._making.items() if not slot.answered()}
        if len(self._ids) + len(self._making) >= MAX_NAMED:
            raise Fault(FaultCode.NO_CAPACITY, f"this host has {MAX_NAMED} snapshots: remove some", retryable=True)
        await trio.to_thread.run_sync(check_disk, self._parts.state.root)

    async def make(self, order: Checkpoint, record: Record, *, stopped_ms: float) -> None:
        """For a sandbox's life: copy what it rests as, or its new base, and answer. Raises Fault, nothing is left."""
        try:
            copy = self._parts.snapshots.copy
            source, name = UUID(record.base), UUID(order.snapshot_id)
            made = await trio.to_thread.run_sync(lambda: copy(source, name, kind="named", owner=""))
            self._ids.add(order.snapshot_id)
            state = await self._state(made.manifest, stopped_ms=stopped_ms)
            if order.snapshot_id in self._removed:  # meanwhile; whoever did that did not see it yet
                await self.remove(order.snapshot_id)
        except Exception as err:
            raise pause_fault(self._parts, err) from err
        if order.snapshot_id in self._removed:
            raise _was_removed()
        self._changed()
        order.reply.answer(state)

    async def describe(self, snapshot_id: str) -> SnapshotState:
        """What there is. Raises Fault."""
        try:
            found = await trio.to_thread.run_sync(self._parts.snapshots.load, UUID(snapshot_id))
            return await self._state(found.manifest)
        except Exception as err:
            raise pause_fault(self._parts, err) from err

    async def remove(self, snapshot_id: str) -> None:
        """Remove one; nothing to do for one that is not here. What sandboxes were made from it stays theirs."""
        self._removed[snapshot_id] = None
        while len(self._removed) > MAX_TOMBSTONES:
            self._removed.popitem(last=False)
        if snapshot_id in self._ids:
            try:
                await self._drop(snapshot_id)
            except Exception as err:
                raise pause_fault(self._parts, err) from err
            self._ids.discard(snapshot_id)
            self._changed()

    async def _drop(self, snapshot_id: str) -> None:
        await trio.to_thread.run_sync(self._parts.snapshots.remove, UUID(snapshot_id))

    async def _state(self, manifest: Manifest, *, stopped_ms: float = 0.0) -> SnapshotState:
        used = await trio.to_thread.run_sync(self._parts.snapshots.allocated_bytes, manifest.id)
        return SnapshotState(
            snapshot_id=str(manifest.id),
            template=manifest.image_name,
            vcpus=manifest.vcpus,
            memory_mb=manifest.memory_mb,
            disk_mb=manifest.disk_mb,
            size_bytes=used,
            stopped_ms=stopped_ms,
        )


def _was_removed() -> Fault:
    return Fault(FaultCode.INVALID_STATE, "the snapshot was removed", details={"object": "snapshot"})
