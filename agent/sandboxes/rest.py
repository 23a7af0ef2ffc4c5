"""The part of a sandbox's life in which it is paused: no VM, no memory, a snapshot that is tidied up."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from agent.sandboxes.commands import Checkpoint, Destroy, Pause, Resume
from agent.sandboxes.compaction import compact_if_too_deep, compact_when_due
from agent.sandboxes.telling import tell_pause
from agent.wire.faults import Fault
from agent.wire.lifecycle import Status

if TYPE_CHECKING:
    from agent.sandboxes.admission import Admission
    from agent.sandboxes.named import NamedSnapshots
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.sandbox import Sandbox


class Rest:
    """See the module. Used by the sandbox's life alone."""

    def __init__(self, parts: HostParts, sandbox: Sandbox, admission: Admission, named: NamedSnapshots) -> None:
        self._parts = parts
        self._sandbox = sandbox
        self._commands = sandbox.commands
        self._admission = admission
        self._named = named

    async def run(self) -> Destroy | Resume:
        """Until it is to run again, or to end."""
        self._sandbox.set_status(Status.PAUSED)
        while True:
            order = await self._wait()
            match order:
                case Destroy():
                    return order
                case Pause():
                    order.reply.answer(self._sandbox.state())
                case Checkpoint():
                    await self._copy(order)
                case Resume():
                    if self._admit(order):
                        deep = partial(compact_if_too_deep, self._parts, self._sandbox.made)
                        await self._commands.unless_stopped(deep)  # if it was: the resume is stopped, too
                        return order

    async def _wait(self) -> Destroy | Pause | Resume | Checkpoint:
        """The next command; meanwhile there is time for what nobody waits for."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell_pause, self._parts, self._sandbox)
            nursery.start_soon(compact_when_due, self._parts, self._sandbox.made)
            order = await self._commands.mailbox.receive()
            nursery.cancel_scope.cancel()
        return order

    def _admit(self, order: Resume) -> bool:
        """Take the memory that it needs, without waiting between the question and the answer."""
        try:
            self._admission.check_resume(self._sandbox.made.record.memory_mb)
        except Fault as fault:
            order.reply.fail(fault)
            return False
        self._commands.current = order
        self._sandbox.set_status(Status.RESUMING)
        return True

    async def _copy(self, order: Checkpoint) -> None:
        """What it rests as, under another name."""
        self._commands.current = order
        try:
            copy = partial(self._named.make, order, self._sandbox.made.record, stopped_ms=0.0)
            if not await self._commands.unless_stopped(copy):
                return  # whoever waits is told with the others
        except Fault as fault:
            order.reply.fail(fault)
        self._commands.current = None
