"""Calls of the control plane into guests: each is passed on to the guest daemon, and its bytes both ways.

A call ends with its caller, with its sandbox's run (`invalid_state` says why), with the connection to the guest
(`unavailable`). A live one ends when the agent does, too: nobody waits for it. A pause does not wait for calls, and
one that fails does not end them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from agent.sandboxes.gate import Lane, Room, lane_of
from agent.wire.calls import GuestCall, parse
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agent.actor.peer import OpenedStream
    from agent.actor.server import ServedStream
    from agent.sandboxes.manager import Manager
    from agent.sandboxes.sandbox import Sandbox

HOSTS_ALONE = frozenset({FaultCode.DRAINING, FaultCode.NO_CAPACITY})
"""What a host says of itself; from a guest it would send the control plane elsewhere."""


class AgentStops(Fault):
    """A live call ends because the agent does."""

    def __init__(self) -> None:
        super().__init__(
            FaultCode.UNAVAILABLE, "the agent of the sandbox's host stops; try again in a moment", retryable=True
        )


class GuestCalls:
    """`call` is what the handlers do with a guest's method."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._room = Room()

    async def call(self, method: str, body: dict[str, Any], served: ServedStream) -> dict[str, Any]:
        """Pass one call on. Raises Fault."""
        asked = parse(GuestCall, body)
        sandbox = self._manager.find(asked.sandbox_id)
        question = {key: value for key, value in body.items() if key not in {"sandbox_id", "live"}}
        lane = lane_of(method, live=asked.live)
        sandbox.guest()
        async with self._room.enter(lane, sandbox.gate.held(lane)), sandbox.gate.enter(lane):
            guest = sandbox.guest()
            timeout = served.deadline - trio.current_time()
            try:
                async with guest.open_stream(method, question, timeout=timeout) as opened:
                    return await _join(served, opened, sandbox, live=lane is Lane.LIVE)
            except AgentStops:
                raise
            except Fault as fault:
                raise _explain(fault, sandbox.explain_lost(guest)) from fault
            finally:
                sandbox.call_ended()


async def _join(served: ServedStream, opened: OpenedStream, sandbox: Sandbox, *, live: bool) -> dict[str, Any]:
    """Pass bytes both ways until the guest's last frame; each side's credit is the only buffer."""
    stopping = False

    async def up() -> None:
        async for channel, data in served:
            sandbox.touch()
            await opened.send(data, channel)
        await opened.end()

    async def watch_agent() -> None:
        nonlocal stopping
        await served.draining.wait()
        stopping = True
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(_quietly, up))
        if live:
            nursery.start_soon(watch_agent)
        async for channel, data in opened:
            sandbox.touch()
            await served.send(data, channel)
        nursery.cancel_scope.cancel()
    if stopping:
        raise AgentStops
    return await opened.reply()


async def _quietly(up: Callable[[], Awaitable[None]]) -> None:
    """A guest that went away while we sent is told by the last frame, not by the sender."""
    try:
        await up()
    except Fault:
        return


def _explain(fault: Fault, lost: Fault | None) -> Fault:
    """A guest's fault, or a lost guest connection (`lost`: by the host's doing), in words for the user."""
    if fault.code in HOSTS_ALONE:
        return Fault(FaultCode.UNAVAILABLE, "the sandbox takes no calls now", retryable=True)
    if fault.code != FaultCode.UNAVAILABLE:
        # `object` is our word for what was not found on this host; a guest cannot say that its sandbox is gone.
        details = {key: value for key, value in fault.details.items() if key != "object"}
        return Fault(fault.code, fault.message, retryable=fault.retryable, details=details)
    if lost is not None:
        return lost
    return Fault(
        FaultCode.UNAVAILABLE, "the connection into the sandbox was lost; its state is unknown", retryable=True
    )
