"""One sandbox of this host, as others see it: what it is, and what they may ask of it. Its life is in life.py.

Calls into the guest run in the task of whoever asks, over the guest link, and end with it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

from agent.actor.mailbox import ReplySlot
from agent.net.addresses import slot_addresses
from agent.sandboxes.commands import Commands, Destroy, Unasked, ended
from agent.sandboxes.gate import Gate
from agent.sandboxes.idle import IdleClock
from agent.sandboxes.made import Made
from agent.wire.calls import SandboxState, SnapshotState
from agent.wire.faults import Fault
from agent.wire.lifecycle import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.guest.driver import Guest
    from agent.sandboxes.records import Record

HOLDS_NOTHING = frozenset({Status.PAUSED, Status.STOPPED})


class Sandbox:
    """Handle of one sandbox; only its life's task changes what is here."""

    def __init__(self, record: Record, changed: Callable[[], None]) -> None:
        self.id = record.sandbox_id
        self.status = Status.PAUSED if record.phase == "paused" else Status.STARTING
        self.made = Made(record)
        self.started: ReplySlot[SandboxState] = ReplySlot()
        self.gone: ReplySlot[None] = ReplySlot()
        self.commands = Commands(f"sandbox {record.sandbox_id}")
        self.gate = Gate()
        self.idle = IdleClock()
        self.served = trio.Event()
        """Its guest has answered a call since it was started or resumed."""
        self.last_active_at = time.time()
        self.ran = record.phase != "making"
        self.clean = True
        self._changed = changed

    def destroy(self) -> ReplySlot[None]:
        """Ask for the end; the slot is answered when nothing is left of it."""
        self.commands.mailbox.stop_nowait(Destroy())
        return self.gone

    def pause(self, *, unasked: Unasked | None = None) -> ReplySlot[SandboxState]:
        """Ask for a pause. `unasked`: it is the host that wants it. Fault `invalid_state`, `busy`."""
        return self.commands.pause(self.status, self.state, unasked=unasked)

    def pause_idle(self) -> ReplySlot[SandboxState]:
        """Ask for a pause, unless something is asked of it meanwhile. Fault `invalid_state`, `busy`."""
        return self.pause(unasked=Unasked(f"it was idle for {self.made.record.timeout_sec} s", self.is_idle))

    def resume(self) -> ReplySlot[SandboxState]:
        """Ask for a resume. Fault `invalid_state`, `busy`."""
        return self.commands.resume(self.status, self.state)

    def checkpoint(self, snapshot_id: str) -> ReplySlot[SnapshotState]:
        """Ask for a snapshot of it. Fault `invalid_state`, `busy`."""
        return self.commands.checkpoint(self.status, snapshot_id)

    def guest(self) -> Guest:
        """The link to the guest daemon. Fault `invalid_state` when the sandbox does not run."""
        if self.status is not Status.RUNNING or self.made.guest is None:
            raise ended(self.status)
        self.touch()
        return self.made.guest

    def call_ended(self) -> None:
        """A call into the guest is over."""
        self.served.set()
        self.touch()

    def explain_lost(self, guest: Guest) -> Fault | None:
        """Why a call over this link has ended, if it was not the guest's doing."""
        if self.ending():
            return Fault(ended().code, "the sandbox was stopped", details={"status": Status.STOPPING})
        if self.made.guest is not guest:
            return Fault(ended().code, "the sandbox was paused", details={"status": self.status})
        if self.status is not Status.RUNNING:
            message = f"the connection into the sandbox was lost while it was {self.status}"
            return Fault(ended().code, message, details={"status": self.status})
        return None

    def touch(self) -> None:
        """Reset the idle clock."""
        self.last_active_at = time.time()
        self.idle.touch()

    def is_idle(self) -> bool:
        """Whether it has done nothing for its time-out: no call runs or waits, none was asked for."""
        return (
            self.status is Status.RUNNING and not self.gate.busy() and self.idle.expired(self.made.record.timeout_sec)
        )

    def ending(self) -> bool:
        """Whether it was running, or paused, and is no more."""
        return self.ran and self.status in {Status.STOPPING, Status.STOPPED}

    def memory_mb(self) -> int:
        """Memory this sandbox holds or will hold: a paused one none."""
        return 0 if self.status in HOLDS_NOTHING else self.made.record.memory_mb

    def state(self) -> SandboxState:
        """What the host tells about it."""
        record, slot = self.made.record, self.made.slot
        return SandboxState(
            sandbox_id=self.id,
            status=self.status,
            vcpus=record.vcpus,
            memory_mb=record.memory_mb,
            disk_mb=record.disk_mb,
            host_ip="" if slot is None else slot_addresses(slot.number).host_ip,
            started_at=record.started_at,
            last_active_at=self.last_active_at,
            timings_ms=self.made.timings_ms,
            disk_bytes=record.disk_bytes,
        )

    def set_status(self, status: Status) -> None:
        """For its life: go on to `status`."""
        if status is not self.status:
            self.status = status
            self._changed()

    def tell_changed(self) -> None:
        """For its life: what the host tells has changed."""
        self._changed()
