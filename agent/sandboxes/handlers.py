"""The agent's side of the wire: each method of `agent.wire.calls`, thin, over the manager and the guest links.

A handler only waits. What it asks for is owned by the sandbox's actor and goes on when the control plane's connection
breaks; a call into a guest ends with its caller.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from agent.wire import limits
from agent.wire.calls import (
    GUEST_METHODS,
    NOTICE_CHANNEL,
    Acknowledge,
    CreateSandbox,
    CreateSnapshot,
    HostDescription,
    SandboxRef,
    SnapshotRef,
    body_of,
    parse,
)
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from agent.actor.peer import OpenedStream
    from agent.actor.server import ServedStream
    from agent.sandboxes.manager import Manager
    from agent.sandboxes.outbox import Outbox

HOSTS_ALONE = frozenset({FaultCode.DRAINING, FaultCode.NO_CAPACITY})
"""What a host says of itself; from a guest it would send the control plane elsewhere."""


MAX_GUEST_CALLS = limits.MAX_STREAMS * 7 // 8
"""Calls into guests at once, of all sandboxes together."""


class Handlers:
    """`Handlers(...)` is a `server.Handler`."""

    def __init__(self, manager: Manager, outbox: Outbox, describe: Callable[[], Awaitable[HostDescription]]) -> None:
        self._manager = manager
        self._outbox = outbox
        self._describe = describe
        self._guest_calls = 0

    async def __call__(self, method: str, body: dict[str, Any], stream: ServedStream) -> dict[str, Any]:
        """Answer one request."""
        if method in GUEST_METHODS:
            return await self._call_guest(method, body, stream)
        kind, _, _ = method.partition(".")
        match kind:
            case "host":
                return await self._host(method, body, stream)
            case "sandbox":
                return await self._sandbox(method, body, stream)
            case "snapshot":
                return await self._snapshot(method, body, stream)
        raise _unknown(method)

    async def _host(self, method: str, body: dict[str, Any], stream: ServedStream) -> dict[str, Any]:
        match method:
            case "host.describe":
                return body_of(await self._describe())
            case "host.list":
                return body_of(self._manager.listing())
            case "host.watch":
                return await self._watch(stream)
            case "host.acknowledge":
                await self._outbox.acknowledge(parse(Acknowledge, body).sequence)
                if self._outbox.entries():
                    self._manager.changed()  # a listing shows only so many of them
                return {}
        raise _unknown(method)

    async def _sandbox(self, method: str, body: dict[str, Any], stream: ServedStream) -> dict[str, Any]:
        manager, deadline = self._manager, stream.deadline
        if method == "sandbox.create":
            sandbox = await manager.create(parse(CreateSandbox, body))
            return body_of(await sandbox.started.wait(deadline=deadline))
        name = parse(SandboxRef, body).sandbox_id
        match method:
            case "sandbox.destroy":
                await manager.destroy(name, deadline=deadline)
                return {}
            case "sandbox.ping":
                manager.find(name).guest()
                return {}
            case "sandbox.pause":
                return body_of(await manager.find(name).pause().wait(deadline=deadline))
            case "sandbox.resume":
                return body_of(await (await manager.resume(name)).wait(deadline=deadline))
        raise _unknown(method)

    async def _snapshot(self, method: str, body: dict[str, Any], stream: ServedStream) -> dict[str, Any]:
        match method:
            case "snapshot.create":
                state = await self._manager.snapshot(parse(CreateSnapshot, body), deadline=stream.deadline)
                return body_of(state)
            case "snapshot.remove":
                await self._manager.named.remove(parse(SnapshotRef, body).snapshot_id)
                return {}
        raise _unknown(method)

    async def _watch(self, stream: ServedStream) -> dict[str, Any]:
        """A notice per change, as fast as the watcher reads; changes in between melt into one."""
        seen = -1
        while (version := await self._manager.wait_changed(seen)) is not None:
            seen = version
            await stream.send(msgspec.msgpack.encode({"version": version}), NOTICE_CHANNEL)
        return {}

    @asynccontextmanager
    async def _room_for_a_call(self) -> AsyncIterator[None]:
        """Calls into guests leave some streams of the connection to creates, destroys and the monitor. Fault `busy`."""
        if self._guest_calls >= MAX_GUEST_CALLS:
            raise Fault(FaultCode.BUSY, "this host has too many calls under way; try again in a moment", retryable=True)
        self._guest_calls += 1
        try:
            yield
        finally:
            self._guest_calls -= 1

    async def _call_guest(self, method: str, body: dict[str, Any], served: ServedStream) -> dict[str, Any]:
        sandbox = self._manager.find(parse(SandboxRef, body).sandbox_id)
        question = {key: value for key, value in body.items() if key != "sandbox_id"}
        sandbox.guest()
        async with self._room_for_a_call(), sandbox.gate.enter():
            timeout = served.deadline - trio.current_time()
            guest = sandbox.guest()
            try:
                async with guest.open_stream(method, question, timeout=timeout) as opened:
                    return await _join(served, opened)
            except Fault as fault:
                raise _explain(fault, sandbox.explain_lost(guest)) from fault
            finally:
                sandbox.call_ended()


def _unknown(method: str) -> Fault:
    return Fault(FaultCode.UNKNOWN_METHOD, f"this agent does not know {method}")


async def _join(served: ServedStream, opened: OpenedStream) -> dict[str, Any]:
    """Pass bytes both ways until the guest's last frame; each side's credit is the only buffer."""

    async def up() -> None:
        async for channel, data in served:
            await opened.send(data, channel)
        await opened.end()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_quietly, up)
        async for channel, data in opened:
            await served.send(data, channel)
        nursery.cancel_scope.cancel()
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
