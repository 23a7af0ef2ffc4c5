"""Pauses everything while this host has lost its control plane: nobody could end, bill or reach what runs on.

Owns: the tasks that pause, one per sandbox, and when each of them tries again.
Owned by: the daemon's nursery.
Takes: the heartbeat's presence, and the manager's table of sandboxes with its version; latest values both.
Emits: nothing. It can only ask; the sandbox's own life pauses, in its turn, and tells it through the outbox.
Dies when: the daemon stops, or drains. It resumes nothing: when the control plane is back, its users decide.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import structlog
import trio

from agent.actor.supervise import RestartPolicy
from agent.enrol.presence import GONE
from agent.sandboxes.commands import Unasked
from agent.wire.faults import Fault
from agent.wire.lifecycle import Status

if TYPE_CHECKING:
    from agent.enrol.presence import PresenceCell
    from agent.sandboxes.manager import Manager
    from agent.sandboxes.sandbox import Sandbox

log = structlog.get_logger()

REASON = "its control plane was lost"

AT_ONCE = 4
"""Pauses asked for at the same time. How many of them write at the same time is the host's `captures_at_once`."""

PATIENCE = 120.0
"""Seconds for one pause, before another sandbox gets its turn beside it: a VM that hangs must not hold up the rest."""

RETRY = RestartPolicy(first_delay=5, max_delay=300)
"""Seconds from one pause that failed to the next try; the loss may last for days."""


class Loss:
    """See the module."""

    def __init__(self, manager: Manager, presence: PresenceCell) -> None:
        self._manager = manager
        self._presence = presence
        self._unasked = Unasked(REASON, self._is_lost)
        self._turns = trio.CapacityLimiter(AT_ONCE)
        self._at: set[Sandbox] = set()

    async def run(self) -> None:
        """Wait for a loss, pause everything until it is over, and so on; returns when the host drains."""
        while True:
            loss = await self._presence.wait_for(*GONE)
            log.error("pausing_everything", state=loss.state, reason=loss.reason)
            draining = False
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_when_back, nursery.cancel_scope)
                draining = await self._pause_all(nursery)
                nursery.cancel_scope.cancel()
            if draining:
                return
            log.info("pausing_ended", running=self._manager.statistics().get(Status.RUNNING, 0))

    def _is_lost(self) -> bool:
        return self._presence.value.state in GONE

    async def _stop_when_back(self, scope: trio.CancelScope) -> None:
        await self._presence.wait_for("online")
        scope.cancel()

    async def _pause_all(self, nursery: trio.Nursery) -> bool:
        """Whatever runs, and whatever comes to run meanwhile; True when the host drains."""
        while True:
            version = self._manager.version
            for sandbox in self._manager.all():
                if sandbox.status is Status.RUNNING and sandbox not in self._at:
                    self._at.add(sandbox)
                    nursery.start_soon(self._pause, sandbox)
            if await self._manager.wait_changed(version) is None:
                return True

    async def _pause(self, sandbox: Sandbox) -> None:
        """Until it does not run, whoever did that."""
        try:
            for attempt in itertools.count(1):
                async with self._turns:
                    await self._pause_once(sandbox)
                if sandbox.status is not Status.RUNNING:
                    return  # no checkpoint from here to its removal from `_at`: a change from now on is seen
                await trio.sleep(RETRY.delay(attempt))
        finally:
            self._at.discard(sandbox)

    async def _pause_once(self, sandbox: Sandbox) -> None:
        if sandbox.status is not Status.RUNNING:
            return
        try:
            await sandbox.pause(unasked=self._unasked).wait(deadline=trio.current_time() + PATIENCE)
        except Fault as fault:
            log.warning("loss_pause_failed", sandbox_id=sandbox.id, code=fault.code, message=fault.message)
