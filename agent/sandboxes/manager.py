"""All sandboxes of this host.

Owns: the nursery of sandbox actors, the table of them. Owned by: the daemon's nursery.
Takes: `create`, `destroy`, `find`, `listing`; the table changes without waiting in between.
Emits: a growing `version`, for `host.watch`.
Dies when: the daemon stops. The sandboxes' VMs live on.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

import structlog
import trio

from agent.sandboxes.admission import Admission, check_disk
from agent.sandboxes.first_records import first_record
from agent.sandboxes.life import Life
from agent.sandboxes.named import NamedSnapshots
from agent.sandboxes.sandbox import Sandbox
from agent.sandboxes.starts import Adopted, Rested, Start
from agent.wire.calls import CreateSandbox, CreateSnapshot, HostListing, SnapshotState
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.actor.mailbox import ReplySlot
    from agent.sandboxes.adoption import Found
    from agent.sandboxes.made import Golden
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record
    from agent.wire.calls import SandboxState

log = structlog.get_logger()

MAX_TOMBSTONES = 4096
"""Ids remembered as ended, so that a create that was held up on the way cannot bring one back."""

MAX_LISTED_ENTRIES = 256
"""Outbox entries in one listing: at most 0.6 MB, so that a long absence of the control plane fits into a frame."""


class Manager:
    """Everything that lives here. `golden`: the snapshot that a boot of this record would end as, if there is one."""

    def __init__(
        self, parts: HostParts, *, memory_mb: int, golden: Callable[[Record], Golden | None] = lambda _: None
    ) -> None:
        self._parts = parts
        self._sandboxes: dict[str, Sandbox] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._nursery: trio.Nursery | None = None
        self._golden = golden
        self.admission = Admission(memory_mb, self._sandboxes)
        self.named = NamedSnapshots(parts, self.changed)
        self.version = 0
        self._changed = trio.Event()

    async def run(self, found: Found, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the actors, beginning with those that were found; until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self.named.begin(found.named)
            for one in found.running:
                self._begin(nursery, one.record, Adopted(one.vm, one.slot))
            for record in found.resting:
                self._begin(nursery, record, Rested())
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # a create that comes now is refused, not a bug

    def _begin(self, nursery: trio.Nursery, record: Record, begin: Start | Adopted | Rested) -> Sandbox:
        sandbox = self._sandboxes[record.sandbox_id] = Sandbox(record, self.changed)
        nursery.start_soon(self._keep, sandbox, begin)
        return sandbox

    async def _keep(self, sandbox: Sandbox, begin: Start | Adopted | Rested) -> None:
        try:
            await Life(self._parts, sandbox, self.admission, self.named).run(begin)
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
        record = await trio.to_thread.run_sync(first_record, self._parts, request)
        return self._admit(request, record)

    def _admit(self, request: CreateSandbox, record: Record) -> Sandbox:
        """Without waiting between the questions and the entry in the table: two at once get one sandbox."""
        existing = self._existing(request.sandbox_id)
        if existing is not None:
            return existing
        if self._nursery is None:
            raise Fault(FaultCode.DRAINING, "this host takes no new sandboxes", retryable=True)
        self.admission.check_create(request.memory_mb)
        if request.snapshot_id is not None:
            envs = None if request.keep_envs else dict(request.envs)
            start = Start(envs, snapshot=UUID(request.snapshot_id))
        else:
            start = Start(dict(request.envs), golden=self._golden(record))
        sandbox = self._begin(self._nursery, record, start)
        self.changed()
        return sandbox

    def _existing(self, sandbox_id: str) -> Sandbox | None:
        """The sandbox if there is one, also when its start is failing: it will say why. Fault once it has ended."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox_id in self._ended or (sandbox is not None and sandbox.ending()):
            raise Fault(FaultCode.INVALID_STATE, "the sandbox has ended")
        return sandbox

    async def resume(self, sandbox_id: str) -> ReplySlot[SandboxState]:
        """Ask for a resume. Fault `not_found`, `invalid_state`, `no_capacity`, `busy`."""
        if self.find(sandbox_id).status is not Status.RUNNING:
            await trio.to_thread.run_sync(check_disk, self._parts.state.root)
        return self.find(sandbox_id).resume()

    async def snapshot(self, request: CreateSnapshot, *, deadline: float) -> SnapshotState:
        """A snapshot of a sandbox under a name of its own. Raises Fault."""
        find = partial(self.find, request.sandbox_id)
        return await self.named.create(request.snapshot_id, find, deadline=deadline)

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

    def all(self) -> Iterable[Sandbox]:
        """Every sandbox, also paused ones, as of now."""
        return list(self._sandboxes.values())

    def listing(self) -> HostListing:
        """What lives and rests here, and what the outbox holds; of very much only the oldest, until acknowledged."""
        resting = {one.id for one in self._sandboxes.values() if one.status is Status.PAUSED}
        return HostListing(
            sandboxes=[sandbox.state() for sandbox in self._sandboxes.values() if sandbox.id not in resting],
            outbox=self._parts.outbox.entries()[:MAX_LISTED_ENTRIES],
            paused=sorted(resting),
            snapshots=self.named.ids(),
        )

    def drain(self) -> None:
        """Take no new sandboxes, and let watchers go."""
        self.admission.draining = True
        self.changed()

    def changed(self) -> None:
        """The listing is different now."""
        self.version += 1
        self._changed.set()
        self._changed = trio.Event()

    async def wait_changed(self, version: int) -> int | None:
        """The version now, as soon as it is not `version`; None when there is nothing more to wait for."""
        while self.version == version and not self.admission.draining:
            await self._changed.wait()
        return None if self.admission.draining else self.version

    def statistics(self) -> dict[str, int]:
        """Sandboxes by status."""
        counts: dict[str, int] = {}
        for sandbox in self._sandboxes.values():
            counts[sandbox.status] = counts.get(sandbox.status, 0) + 1
        return counts
