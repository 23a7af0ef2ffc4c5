"""What a sandbox can be told, and who waits for which answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from agent.actor.mailbox import Mailbox, ReplySlot
from agent.wire.calls import SandboxState, SnapshotState
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status

if TYPE_CHECKING:
    from collections.abc import Awaitable

MAILBOX_CAPACITY = 8

LIVELY = frozenset({Status.RUNNING, Status.PAUSING, Status.PAUSED, Status.RESUMING})
"""Only these take commands other than to end."""


@dataclass(frozen=True, slots=True)
class Destroy:
    """End the sandbox and everything of it."""


@dataclass(frozen=True, slots=True)
class Unasked:
    """Why the host pauses a sandbox by itself. `reason` is told; `wanted` is asked again when its turn has come."""

    reason: str
    wanted: Callable[[], bool]


@dataclass(slots=True, eq=False)
class Pause:
    """Rest as a snapshot. `unasked`: nobody told us to."""

    unasked: Unasked | None = None
    reply: ReplySlot[SandboxState] = field(default_factory=ReplySlot)


@dataclass(slots=True, eq=False)
class Resume:
    """Run again."""

    reply: ReplySlot[SandboxState] = field(default_factory=ReplySlot)


@dataclass(slots=True, eq=False)
class Checkpoint:
    """Leave a snapshot called `snapshot_id`, and go on as before."""

    snapshot_id: str
    reply: ReplySlot[SnapshotState] = field(default_factory=ReplySlot)


Command = Destroy | Pause | Resume | Checkpoint


def ended(status: Status = Status.STOPPING) -> Fault:
    """What whoever waited for something else is told when the sandbox ends."""
    return Fault(FaultCode.INVALID_STATE, f"the sandbox is {status}", details={"status": status})


class Commands:
    """The mailbox of one sandbox. Two who want the same get the same outcome; what is so already is answered."""

    def __init__(self, name: str) -> None:
        self.mailbox: Mailbox[Command] = Mailbox(name, MAILBOX_CAPACITY)
        self.current: Pause | Resume | Checkpoint | None = None
        """What the actor is at."""
        self._last: Pause | Resume | None = None

    def pause(
        self, status: Status, state: Callable[[], SandboxState], *, unasked: Unasked | None = None
    ) -> ReplySlot[SandboxState]:
        """Ask for a pause. Fault `invalid_state` when it cannot be, Busy when too much is asked for.

        One that a user asks for, too, is the user's; of two reasons of the host the later one counts.
        """
        last = self._waiting()
        if isinstance(last, Pause):
            if last.unasked is not None:
                last.unasked = unasked
            return last.reply
        return self._order(Pause(unasked), status, Status.PAUSED, state)

    def resume(self, status: Status, state: Callable[[], SandboxState]) -> ReplySlot[SandboxState]:
        """Ask for a resume; likewise. While it pauses, that is what comes next."""
        last = self._waiting()
        if isinstance(last, Resume):
            return last.reply
        return self._order(Resume(), status, Status.RUNNING, state)

    def checkpoint(self, status: Status, snapshot_id: str) -> ReplySlot[SnapshotState]:
        """Ask for a snapshot; likewise."""
        self._check(status)
        command = Checkpoint(snapshot_id)
        self.mailbox.send_nowait(command)
        return command.reply

    def idle(self) -> bool:
        """Whether nothing is asked for."""
        return self.current is None and self._waiting() is None and self.mailbox.statistics().waiting == 0

    async def unless_stopped(self, work: Callable[[], Awaitable[object]]) -> bool:
        """Do `work`; False when a stop request had us give up. Raises its Fault."""
        done = False
        failure: Fault | None = None

        async def give_up() -> None:
            await self.mailbox.stop_requested.wait()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            try:
                await work()
                done = True
            except Fault as fault:
                failure = fault
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return done

    def decide(self, order: Pause | Resume, outcome: SandboxState | Fault) -> None:
        """The answer to what the actor was at."""
        self.current = None
        if isinstance(outcome, Fault):
            order.reply.fail(outcome)
        else:
            order.reply.answer(outcome)

    def refuse_all(self) -> None:
        """The sandbox has ended: tell those who wait."""
        left = self.mailbox.close()
        for command in (self.current, *left):
            if command is not None and not isinstance(command, Destroy):
                command.reply.fail(ended())
        self.current = None

    def _order(
        self, command: Pause | Resume, status: Status, goal: Status, state: Callable[[], SandboxState]
    ) -> ReplySlot[SandboxState]:
        self._check(status)
        if self._waiting() is None and status is goal:
            command.reply.answer(state())
            return command.reply
        self.mailbox.send_nowait(command)
        self._last = command
        return command.reply

    def _check(self, status: Status) -> None:
        if self.mailbox.stop_requested.is_set():
            raise ended()
        if status not in LIVELY:
            raise ended(status)

    def _waiting(self) -> Pause | Resume | None:
        """The last pause or resume that was asked for, if it is not decided yet."""
        return None if self._last is None or self._last.reply.answered() else self._last
