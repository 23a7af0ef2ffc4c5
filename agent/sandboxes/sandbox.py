"""One sandbox of this host.

Owns: its VM, slot, overlay, record and guest link. Owned by: the manager's nursery.
Takes: `destroy` (stop lane: it also abandons a build in progress). Calls into the guest run beside it, in the task of
whoever asks, over the guest link, and end with it.
Emits: `started` and `gone` (reply slots), outbox entries for what it did by itself, the `changed` callback.
Dies when: destroyed, its VM dies, or its build fails; everything it made is then taken down. When the daemon stops
(cancellation) it takes nothing down: the VM lives on and is adopted by the next agent.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio

from agent.actor.mailbox import Mailbox, ReplySlot
from agent.actor.supervise import RestartPolicy, supervise
from agent.net.addresses import slot_addresses
from agent.sandboxes import build, removal
from agent.sandboxes.gate import Gate
from agent.wire.calls import SandboxState
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.guest.driver import Guest
    from agent.net.ledger import Slot
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.records import Record
    from agent.vmm.driver import Vm

log = structlog.get_logger()

MAILBOX_CAPACITY = 8
CLEAN_UP = RestartPolicy(restarts=8, first_delay=0.2, max_delay=10)
"""How often taking a sandbox down is tried before it is left to the next start of the agent."""
VM_WATCH = RestartPolicy(max_delay=5)
"""Watching can fail (no descriptor left, say) where the VM has not."""
HOST_PATH = re.compile(r"(?<![\w.])(?:/[\w.@+-]+){2,}/?")
"""A path in a VMM's last words. Users see why their sandbox died, and have no business with our directories."""


@dataclass(frozen=True, slots=True)
class Destroy:
    """End the sandbox and everything of it."""


@dataclass(frozen=True, slots=True)
class _Ending:
    """Why a sandbox ends: its build failed, its VM died by itself, or (neither is set) on command."""

    failed: Fault | None = None
    died: str | None = None


class Sandbox:
    """Handle and runner of one sandbox; only `run`'s task changes its state."""

    def __init__(self, parts: HostParts, record: Record, changed: Callable[[], None]) -> None:
        self.id = record.sandbox_id
        self.status = Status.STARTING
        self.started: ReplySlot[SandboxState] = ReplySlot()
        self.gone: ReplySlot[None] = ReplySlot()
        self.gate = Gate()
        self.last_active_at = time.time()
        self.clean = True
        self._parts = parts
        self._made = build.Made(record)
        self._changed = changed
        self._ran = False
        self._news: str | None = None
        self._mailbox: Mailbox[Destroy] = Mailbox(f"sandbox {record.sandbox_id}", MAILBOX_CAPACITY)

    # the handle: what others may call

    def destroy(self) -> ReplySlot[None]:
        """Ask for the end; the slot is answered when nothing is left of it."""
        self._mailbox.stop_nowait(Destroy())
        return self.gone

    def guest(self) -> Guest:
        """The link to the guest daemon. Fault `invalid_state` when the sandbox does not run."""
        if self.status is not Status.RUNNING or self._made.guest is None:
            raise Fault(FaultCode.INVALID_STATE, f"the sandbox is {self.status}", details={"status": self.status})
        self.touch()
        return self._made.guest

    def touch(self) -> None:
        """Reset the idle clock."""
        self.last_active_at = time.time()

    def ending(self) -> bool:
        """Whether it was running and is no more."""
        return self._ran and self.status is not Status.RUNNING

    def memory_mb(self) -> int:
        """Memory this sandbox holds or will hold."""
        return self._made.record.memory_mb

    def state(self) -> SandboxState:
        """What the host tells about it."""
        record = self._made.record
        return SandboxState(
            sandbox_id=self.id,
            status=self.status,
            vcpus=record.vcpus,
            memory_mb=record.memory_mb,
            disk_mb=record.disk_mb,
            host_ip=slot_addresses(record.slot).host_ip if record.slot else "",
            started_at=record.started_at,
            last_active_at=self.last_active_at,
            timings_ms=self._made.timings_ms,
        )

    # the runner

    async def run(self, *, envs: dict[str, str]) -> None:
        """Build it, watch over it, take it down."""
        with structlog.contextvars.bound_contextvars(sandbox_id=self.id):
            await self._take_down(await self._live(envs))

    async def run_adopted(self, vm: Vm, slot: Slot) -> None:
        """Go on with a VM that an earlier agent started."""
        self._made.vm = vm
        self._made.slot = slot
        with structlog.contextvars.bound_contextvars(sandbox_id=self.id):
            await self._take_down(await self._live(None))

    async def _live(self, envs: dict[str, str] | None) -> _Ending:
        """From the first step to the reason for the end. `envs` None: it is built already."""
        ending: _Ending | None = None
        async with trio.open_nursery() as nursery:
            ending = await self._start(envs, nursery)
            if ending is None:
                ending = await self._watch()
            self._set(Status.STOPPING)
            nursery.cancel_scope.cancel()
        assert ending is not None  # noqa: S101 - a cancelled nursery raises instead of getting here
        return ending

    async def _start(self, envs: dict[str, str] | None, nursery: trio.Nursery) -> _Ending | None:
        if envs is None:
            build.connect(self._parts, self._made, nursery)
        else:
            try:
                if not await self._build_unless_stopped(envs, nursery):
                    return _Ending()
            except Fault as fault:
                log.warning("sandbox_build_failed", code=fault.code, message=fault.message)
                return _Ending(failed=fault)
        self._ran = True
        self._set(Status.RUNNING)
        self.started.answer(self.state())
        log.info("sandbox_running", adopted=envs is None, **self._made.timings_ms)
        return None

    async def _build_unless_stopped(self, envs: dict[str, str], link_nursery: trio.Nursery) -> bool:
        """Build; False when a stop request made us give up."""
        built = False

        async def give_up() -> None:
            await self._mailbox.stop_requested.wait()
            nursery.cancel_scope.cancel()

        failure: Fault | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            try:
                await build.build(self._parts, self._made, envs=envs, nursery=link_nursery)
                built = True
            except Fault as fault:
                failure = fault
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return built

    async def _watch(self) -> _Ending:
        """Until somebody ends it or the VM dies."""
        ending = _Ending()

        async def watch_vm() -> None:
            nonlocal ending
            assert self._made.vm is not None  # noqa: S101 - it runs
            reason = await self._made.vm.wait_exit()
            log.error("vm_died", reason=reason)
            ending = _Ending(died=HOST_PATH.sub("…", reason) or "its VM ended")
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervise, "vm_watch", watch_vm, VM_WATCH)
            await self._mailbox.receive()
            nursery.cancel_scope.cancel()
        return ending

    async def _take_down(self, ending: _Ending) -> None:
        """Tell first, then remove: an entry for something that is still being removed is true, silence is not."""
        self._set(Status.STOPPING)
        self._mailbox.close()
        self._news = ending.died
        self.clean = await self._remove()
        self._set(Status.STOPPED)
        self.started.fail(ending.failed or Fault(FaultCode.INVALID_STATE, "the sandbox was destroyed while it started"))
        if self.clean:
            self.gone.answer(None)
        else:
            self.gone.fail(Fault(FaultCode.INTERNAL, "the host could not remove everything; it will try again later"))

    async def _remove(self) -> bool:
        """Whether nothing is left. A daemon that stops half-way leaves the rest to the next one."""
        for attempt in range(1, (CLEAN_UP.restarts or 0) + 1):
            try:
                await self._try_to_remove()
            except Exception:
                log.exception("sandbox_removal_failed", attempt=attempt)
                await trio.sleep(CLEAN_UP.delay(attempt))
            else:
                log.info("sandbox_removed")
                return True
        return False

    async def _try_to_remove(self) -> None:
        try:
            await self._tell()
        except OSError as err:  # a full disk must not protect what fills it; it is told before the last trace goes
            log.warning("outbox_not_written", error=str(err))
        await removal.dismantle(self._parts, self._made, settled=self._news is None)
        await self._tell()
        await removal.forget(self._parts, self.id)

    async def _tell(self) -> None:
        """Put into the outbox what happened by itself."""
        if self._news is not None:
            await self._parts.outbox.append(self.id, "died", self._news)
            self._news = None
            self._changed()

    def _set(self, status: Status) -> None:
        if status is not self.status:
            self.status = status
            self._changed()
