"""The agent's end of the connection to the pager's process.

Owns: the connection and its peer. Owned by: the agent's daemon, which runs `run` in its nursery.
Takes: the calls of `Pager`, from any task. Dies when: it is cancelled. A connection that breaks (the pager was killed
and comes back) is made again, and a call that was under way is asked again: each may be repeated.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import trio

from agent.actor.peer import OpenerPeer
from agent.pager.control import SOCKET, as_error
from agent.pager.records import encode_path
from agent.pager.service import PagedVm, Pager, PagerStatistics, PagerUnavailable
from agent.pager.sockets import connect_unix
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger()

CALL_TIMEOUT = 30.0
"""Seconds a call may take, the restart of a killed pager included."""
RETRY_PAUSE = 0.05
ATTEMPT_TIMEOUT = 2.0
_NOT_ANSWERED = {FaultCode.UNAVAILABLE, FaultCode.DRAINING}


class PagerClient(Pager):
    """Asks the pager that serves from `directory`. `run` must be running."""

    def __init__(self, directory: Path, *, call_timeout: float = CALL_TIMEOUT) -> None:
        self._path = directory / SOCKET
        self._call_timeout = call_timeout
        self._peer: OpenerPeer | None = None
        self._connected = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, keep the connection, connect again; until cancelled. `started()` at once."""
        task_status.started()
        while True:
            peer = OpenerPeer(await self._dial())
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._announce, peer)
                    await peer.run()
                    nursery.cancel_scope.cancel()
            finally:
                self._peer = None
                if self._connected.is_set():  # else somebody may wait on it for the next connection
                    self._connected = trio.Event()
            log.info("pager_connection_lost", reason=peer.reason)
            await trio.sleep(RETRY_PAUSE)

    async def _announce(self, peer: OpenerPeer) -> None:
        await peer.ready()
        self._peer = peer
        self._connected.set()

    async def _dial(self) -> trio.SocketStream:
        while True:
            with trio.move_on_after(ATTEMPT_TIMEOUT), suppress(OSError):
                return await connect_unix(self._path)
            await trio.sleep(RETRY_PAUSE)

    async def listen(self, vm: PagedVm) -> None:
        """See Pager."""
        await self._call("listen", msgspec.to_builtins(vm, enc_hook=encode_path), self._call_timeout)

    async def wait_connected(self, vm_id: str, *, timeout: float) -> None:  # noqa: ASYNC109 - see Pager
        """See Pager."""
        await self._call("wait_connected", {"vm_id": vm_id, "timeout": timeout}, timeout + self._call_timeout)

    async def record_working_set(self, vm_id: str) -> None:
        """See Pager."""
        await self._call("record_working_set", {"vm_id": vm_id}, self._call_timeout)

    async def release(self, vm_id: str) -> PagerStatistics | None:
        """See Pager."""
        answer = await self._call("release", {"vm_id": vm_id}, self._call_timeout)
        return msgspec.convert(answer.get("statistics"), PagerStatistics | None)

    async def failure(self, vm_id: str) -> str | None:
        """See Pager."""
        answer = await self._call("failure", {"vm_id": vm_id}, self._call_timeout)
        return msgspec.convert(answer.get("failure"), str | None)

    async def damage(self, vm_id: str) -> str | None:
        """See Pager."""
        answer = await self._call("failure", {"vm_id": vm_id}, self._call_timeout)
        return msgspec.convert(answer.get("failure"), str | None) if answer.get("damaged") is True else None

    async def statistics(self) -> dict[str, PagerStatistics]:
        """See Pager."""
        answer = await self._call("statistics", {}, self._call_timeout)
        return msgspec.convert(answer.get("vms"), dict[str, PagerStatistics])

    async def _call(self, method: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:  # noqa: ASYNC109
        deadline = trio.current_time() + timeout
        while True:
            peer = await self._wait_connected(method, deadline)
            try:
                return await peer.call(method, body, timeout=max(0.001, deadline - trio.current_time()))
            except Fault as fault:
                if fault.code not in _NOT_ANSWERED or trio.current_time() >= deadline:
                    raise as_error(method, fault) from fault
            await trio.sleep(RETRY_PAUSE)

    async def _wait_connected(self, method: str, deadline: float) -> OpenerPeer:
        with trio.move_on_at(deadline):
            while self._peer is None or self._peer.closed.is_set():
                await self._connected.wait()
                await trio.lowlevel.checkpoint()  # `run` is about to see that the connection has ended
            return self._peer
        raise PagerUnavailable(f"the pager does not answer {method}: nobody serves at {self._path}")
