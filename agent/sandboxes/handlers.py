"""The agent's side of the wire: each method of `agent.wire.calls`, thin, over the manager and the guest links.

A handler only waits. What it asks for is owned by the sandbox's actor and goes on when the control plane's connection
breaks; a call into a guest ends with its caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from agent.sandboxes.guest_calls import GuestCalls
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
    from collections.abc import Awaitable, Callable

    from agent.actor.server import ServedStream
    from agent.sandboxes.manager import Manager
    from agent.sandboxes.outbox import Outbox


class Handlers:
    """`Handlers(...)` is a `server.Handler`."""

    def __init__(self, manager: Manager, outbox: Outbox, describe: Callable[[], Awaitable[HostDescription]]) -> None:
        self._manager = manager
        self._outbox = outbox
        self._describe = describe
        self._guests = GuestCalls(manager)

    async def __call__(self, method: str, body: dict[str, Any], stream: ServedStream) -> dict[str, Any]:
        """Answer one request."""
        if method in GUEST_METHODS:
            return await self._guests.call(method, body, stream)
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


def _unknown(method: str) -> Fault:
    return Fault(FaultCode.UNKNOWN_METHOD, f"this agent does not know {method}")
