"""The life of one sandbox: the task that owns it.

Owns: its VM, slot, overlay, record, snapshots and guest link. Owned by: the manager's nursery.
Takes: Pause, Resume and Checkpoint, in order, from its mailbox; Destroy from the stop lane, which abandons whatever is
under way. Emits: answers, outbox entries for what it did by itself, the `changed` callback.
Dies when: destroyed, its VM dies, or its build fails; everything it made is then taken down. When the daemon stops
(cancellation) it takes nothing down: the VM lives on and is adopted by the next agent.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from agent.actor.supervise import RestartPolicy, supervise
from agent.sandboxes import working_set
from agent.sandboxes.build import build
from agent.sandboxes.checkpoint import checkpoint
from agent.sandboxes.commands import Checkpoint, Destroy, Pause, Resume
from agent.sandboxes.disks import recover_disk
from agent.sandboxes.greeting import connect
from agent.sandboxes.made import HOST_PATH, without_paths
from agent.sandboxes.pausing import WAKE_PATIENCE, leave, pause, wake
from agent.sandboxes.removal import Ending, Removal
from agent.sandboxes.rest import Rest
from agent.sandboxes.resuming import paging_damage, paging_failure, resume
from agent.sandboxes.starts import Adopted, Rested, Start
from agent.sandboxes.telling import tell, tell_pause
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status

if TYPE_CHECKING:
    from agent.net.ledger import Slot
    from agent.sandboxes.admission import Admission
    from agent.sandboxes.named import NamedSnapshots
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.sandbox import Sandbox
    from agent.vmm.driver import Vm

log = structlog.get_logger()

VM_WATCH = RestartPolicy(max_delay=5)
"""Watching can fail (no descriptor left, say) where the VM has not."""


class Life:
    """See the module."""

    def __init__(self, parts: HostParts, sandbox: Sandbox, admission: Admission, named: NamedSnapshots) -> None:
        self._parts = parts
        self._sandbox = sandbox
        self._made = sandbox.made
        self._mailbox = sandbox.commands.mailbox
        self._named = named
        self._rest = Rest(parts, sandbox, admission, named)

    async def run(self, begin: Start | Adopted | Rested) -> None:
        """From its first step, or from where an earlier agent left it, until nothing is left."""
        with structlog.contextvars.bound_contextvars(sandbox_id=self._sandbox.id):
            ending = await self._live(begin)
            sandbox = self._sandbox
            sandbox.set_status(Status.STOPPING)
            sandbox.commands.refuse_all()
            sandbox.clean = await Removal(self._parts, sandbox, ending).run()
            sandbox.set_status(Status.STOPPED)
            sandbox.started.fail(
                ending.failed or Fault(FaultCode.INVALID_STATE, "the sandbox was destroyed while it started")
            )
            if sandbox.clean:
                sandbox.gone.answer(None)
            else:
                trouble = "the host could not remove everything; it will try again later"
                sandbox.gone.fail(Fault(FaultCode.INTERNAL, trouble))

    async def _live(self, begin: Start | Adopted | Rested | Resume) -> Ending:
        """Wake and rest, until it ends."""
        while True:
            if not isinstance(begin, Rested):
                ending = await self._wake_up(begin)
                if ending is not None:
                    return ending
                await self._settle_down()
            order = await self._rest.run()
            if isinstance(order, Destroy):
                return Ending()
            begin = order

    async def _wake_up(self, begin: Start | Adopted | Resume) -> Ending | None:
        """One run of a VM. None: it rests now (or still)."""
        async with trio.open_nursery() as nursery:
            try:
                ending = await self._run_vm(begin, nursery)
                if ending is not None:
                    self._sandbox.set_status(Status.STOPPING)
            finally:
                self._made.unlink()
            nursery.cancel_scope.cancel()
        return ending

    async def _run_vm(self, begin: Start | Adopted | Resume, nursery: trio.Nursery) -> Ending | None:
        match begin:
            case Start():
                ending, runs = await self._build(begin, nursery)
            case Adopted(vm, slot):
                self._adopt(vm, slot, nursery)
                ending, runs = None, True
            case Resume():
                ending, runs = await self._resume(nursery)
        return await self._serve(adopted=isinstance(begin, Adopted)) if runs else ending

    async def _build(self, start: Start, nursery: trio.Nursery) -> tuple[Ending | None, bool]:
        try:
            if not await self._sandbox.commands.unless_stopped(
                partial(build, self._parts, self._made, start=start, nursery=nursery)
            ):
                return Ending(), False
        except Fault as fault:
            log.warning("sandbox_build_failed", code=fault.code, message=fault.message)
            return Ending(failed=fault), False
        self._runs()
        self._sandbox.started.answer(self._sandbox.state())
        return None, True

    def _adopt(self, vm: Vm, slot: Slot, nursery: trio.Nursery) -> None:
        self._made.vm, self._made.slot = vm, slot
        connect(self._parts, self._made, nursery)
        self._made.settled = True  # an earlier agent may have been killed while it stood still
        self._runs()
        self._sandbox.started.answer(self._sandbox.state())

    async def _resume(self, nursery: trio.Nursery) -> tuple[Ending | None, bool]:
        order = self._sandbox.commands.current
        assert isinstance(order, Resume)  # noqa: S101 - set by _rest
        try:
            if not await self._sandbox.commands.unless_stopped(
                partial(resume, self._parts, self._made, nursery=nursery)
            ):
                return Ending(), False
        except Fault as fault:
            log.warning("sandbox_resume_failed", code=fault.code, message=fault.message)
            self._sandbox.set_status(Status.PAUSED)
            self._sandbox.commands.decide(order, fault)
            return None, False
        self._runs()
        self._sandbox.commands.decide(order, self._sandbox.state())
        return None, True

    def _runs(self) -> None:
        sandbox = self._sandbox
        sandbox.ran = True
        sandbox.served = trio.Event()
        sandbox.touch()
        sandbox.set_status(Status.RUNNING)
        log.info("sandbox_running", **self._made.timings_ms)

    async def _serve(self, *, adopted: bool) -> Ending | None:
        """Until it is paused (None), somebody ends it, or the VM dies."""
        ending = Ending()

        async def watch_vm() -> None:
            nonlocal ending
            assert self._made.vm is not None  # noqa: S101 - it runs
            reason = await self._made.vm.wait_exit()
            if self._made.record.phase == "paused":
                return  # as it was meant to be
            failure = await paging_failure(self._parts, self._made)
            damaged = await paging_damage(self._parts, self._made) is not None
            log.error("vm_died", reason=reason, paging_failure=failure, damaged=damaged)
            if damaged and self._made.golden is not None:
                self._made.golden.failed()
            said = HOST_PATH.sub("…", reason) if failure is None else without_paths(self._parts, failure)
            ending = Ending(died=said or "its VM ended", damaged=damaged)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervise, "vm_watch", watch_vm, VM_WATCH)
            nursery.start_soon(working_set.record, self._parts, self._sandbox)
            if adopted:
                await self._sandbox.commands.unless_stopped(partial(recover_disk, self._parts, self._made))
            await self._obey()
            nursery.cancel_scope.cancel()
        return None if self._made.record.phase == "paused" else ending

    async def _obey(self) -> None:
        """Do what comes, until the VM is not needed any more."""
        while True:
            order = await self._next()
            match order:
                case Destroy():
                    return
                case Resume():
                    order.reply.answer(self._sandbox.state())
                case Checkpoint():
                    await self._checkpoint(order)
                case Pause():
                    await self._pause(order)
            if self._made.record.phase == "paused":
                return

    async def _next(self) -> Destroy | Pause | Resume | Checkpoint:
        """The next command. Until it comes there is time for a guest that still stands still."""
        async with trio.open_nursery() as nursery:
            if self._made.stopped_at or self._made.settled:
                nursery.start_soon(partial(wake, self._made, patience=WAKE_PATIENCE))
            order = await self._mailbox.receive()
            nursery.cancel_scope.cancel()
        return order

    async def _pause(self, order: Pause) -> None:
        sandbox = self._sandbox
        if order.unasked is not None and not order.unasked.wanted():
            order.reply.fail(Fault(FaultCode.INVALID_STATE, f"not any more that {order.unasked.reason}"))
            return
        sandbox.commands.current = order
        untold = "" if order.unasked is None else order.unasked.reason
        sandbox.set_status(Status.PAUSING)
        try:
            await self._sandbox.commands.unless_stopped(partial(pause, self._parts, self._made, untold=untold))
        except Fault as fault:
            sandbox.set_status(Status.RUNNING)
            log.warning("sandbox_pause_failed", code=fault.code, message=fault.message, **self._made.timings_ms)
            if order.unasked is not None and sandbox.idle.failed():
                await tell(self._parts, self._sandbox, "pause_failed", fault.message)
            self._sandbox.commands.decide(order, fault)
        # A success is decided by `_settle_down`, what was abandoned by the end of the sandbox.

    async def _checkpoint(self, order: Checkpoint) -> None:
        """Of a running sandbox: first its base is made anew, then that is copied."""
        self._sandbox.commands.current = order
        try:
            if not await self._sandbox.commands.unless_stopped(partial(checkpoint, self._parts, self._made)):
                return
            stopped_ms = self._made.timings_ms.get("stopped_ms", 0.0)
            log.info("sandbox_checkpoint", **self._made.timings_ms)
            await self._named.make(order, self._made.record, stopped_ms=stopped_ms)
        except Fault as fault:
            order.reply.fail(fault)
        self._sandbox.commands.current = None

    async def _settle_down(self) -> None:
        """After a commit: let the VM go. After a resume that failed there is nothing to do."""
        await leave(self._parts, self._made, hurry=self._mailbox.stop_requested)
        order = self._sandbox.commands.current
        if not isinstance(order, Pause):
            return
        self._sandbox.idle.succeeded()
        log.info("sandbox_paused", unasked=self._made.record.untold, **self._made.timings_ms)
        await tell_pause(self._parts, self._sandbox)
        self._sandbox.set_status(Status.PAUSED)
        if not self._mailbox.stop_requested.is_set():  # else destroy has won
            self._sandbox.commands.decide(order, self._sandbox.state())
