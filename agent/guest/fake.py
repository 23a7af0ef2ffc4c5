"""A guest daemon that is a coroutine: the same frames as the real one, over a stream in memory.

For tests and for hosts that only pretend. It knows the methods that need no operating system; `exec` runs none, but
what fake_programs.py knows, or answers what `program` says.
"""

from __future__ import annotations

from typing import Any

import trio

from agent.actor.server import Handler, ServedStream, ServerPeer
from agent.guest.client import GuestLink
from agent.guest.fake_processes import FakeProcesses, Program
from agent.wire.faults import Fault, FaultCode
from agent.wire.messages import Body


def echo(body: Body) -> tuple[bytes, int]:
    """Print the command line, exit 0."""
    return (" ".join([body.get("cmd", ""), *body.get("args", [])]) + "\n").encode(), 0


class FakeGuest:
    """A VM's guest daemon together with the host's link to it, which is the real one: keeps `agent.guest.driver.Guest`.

    `boots` False: it never answers. `answer` serves the requests (see `agent.actor.server.Handler`).
    `calls`: the methods asked for, in order. `frozen`: from `settle` to `thaw` or `configure`; processes stand still
    then. It never thaws by itself. `processes`: those of a VM that was there before this link to it.
    """

    def __init__(
        self,
        address: str,
        *,
        program: Program = echo,
        boots: bool = True,
        answer: Handler | None = None,
        processes: FakeProcesses | None = None,
    ) -> None:
        self.address = address
        self.boots = boots
        self.configured: Body = {}
        self.calls: list[str] = []
        self._owns_processes = processes is None
        self.processes = processes or FakeProcesses()
        self.connections = 0
        self._program = program
        self._answer = answer or self.answer
        self._link = GuestLink(address, connect=self._connect)
        self._server: ServerPeer | None = None
        self._nursery: trio.Nursery | None = None
        self.wait_connected = self._link.wait_connected
        self.call = self._link.call
        self.open_stream = self._link.open_stream

    async def run(self) -> None:
        """Serve and keep the connection; until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._owns_processes:
                self.processes.nursery = nursery
            await self._link.run()

    def hang_up(self) -> None:
        """Close the connection, as a guest daemon does that is killed."""
        if self._server is not None:
            self._server.close()

    async def _connect(self, _address: str, _port: int) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if not self.boots or self._nursery is None:
            raise ConnectionRefusedError
        near, far = _stream_pair()
        self._server = ServerPeer(far, self._answer)
        self._nursery.start_soon(self._server.run)
        self.connections += 1
        return near

    async def answer(self, method: str, body: Body, stream: ServedStream) -> dict[str, Any]:
        """What a guest daemon says that needs no operating system."""
        self.calls.append(method)
        match method:
            case "configure":
                self.configured = body
                self.frozen = False
                return {}
            case "settle":
                self.frozen = True
                return {"frozen": True, "synced": True, "duration_ms": 0}
            case "thaw":
                self.frozen = False
                return {}
            case "exec":
                return await self.processes.exec(body, stream, self._program)
            case "processes.attach":
                return await self.processes.attach(body, stream)
            case "processes.list":
                return self.processes.list()
            case "processes.signal":
                return self.processes.signal(body)
            case "processes.resize":
                return self.processes.resize(body)
            case _:
                raise Fault(FaultCode.UNKNOWN_METHOD, f"the fake guest does not know {method}")

    @property
    def frozen(self) -> bool:
        """Whether its processes stand still."""
        return self.processes.frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self.processes.frozen = frozen


def _stream_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
    from trio.testing import memory_stream_pair  # noqa: PLC0415 - only a fake needs Trio's testing parts

    return memory_stream_pair()
