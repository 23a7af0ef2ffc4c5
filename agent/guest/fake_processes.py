"""All processes of a fake guest: the daemon's methods about them, as docs/protocol.md has them.

`FakeProcesses` may outlive the `FakeGuest` that it is given to, as a VM's processes outlive its host's agent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import trio

from agent.actor.server import ServedStream
from agent.guest.fake_process import SIGKILL, FakeProcess, Reader
from agent.guest.fake_programs import LiveProgram, Process, find_program
from agent.wire.calls import NOTICE_CHANNEL
from agent.wire.faults import Fault, FaultCode
from agent.wire.messages import Body

KEPT = 64
KEPT_SECONDS = 600.0

Program = Callable[[Body], tuple[bytes, int]]


class FakeProcesses:
    """All of one guest. Its tasks run in `nursery`."""

    def __init__(self, nursery: trio.Nursery | None = None) -> None:
        self.nursery = nursery
        self.all: dict[int, FakeProcess] = {}
        self._frozen = False
        self._next_pid = 7

    @property
    def frozen(self) -> bool:
        """Whether all stand still."""
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self._frozen = frozen
        for process in list(self.all.values()):
            process.changed()

    def living(self) -> list[FakeProcess]:
        """Those that run."""
        return [process for process in self.all.values() if process.reply is None]

    async def exec(self, body: Body, stream: ServedStream, program: Program) -> Body:
        """The method of that name; `program` answers for commands that no program is written for."""
        tag = body.get("tag")
        if tag is not None and any(process.tag == tag for process in self.living()):
            raise Fault(FaultCode.CONFLICT, f"the tag {tag} is in use")
        run = find_program(body) or _answering(*program(body))
        self._forget()
        process = self.all[self._next_pid] = FakeProcess(self, self._next_pid, body)
        self._next_pid += 1
        assert self.nursery is not None  # noqa: S101 - the guest runs
        self.nursery.start_soon(process.run, run)
        named = {"tag": process.tag} if process.tag else {}
        if body.get("background"):
            return {"pid": process.pid, "tag": process.tag}
        try:
            await stream.send(msgspec.msgpack.encode({"pid": process.pid, **named}), NOTICE_CHANNEL)
        except trio.Cancelled:
            if not process.detached:
                process.signal(SIGKILL)
            raise
        return await process.serve(stream, Reader(0, observes=False))

    async def attach(self, body: Body, stream: ServedStream) -> Body:
        """processes.attach."""
        process = self._find(body, ended=True)
        if not process.detached:
            raise Fault(FaultCode.INVALID_ARGUMENT, "the process is not detached")
        reader, skipped = process.reader(body.get("offset"), observes=bool(body.get("observe")))
        named = {"tag": process.tag} if process.tag else {}
        said = {"pid": process.pid, **named, "pty": process.pty, "offset": reader.position, "skipped": skipped}
        said |= {"replay": process.total - reader.position, "ended": process.reply is not None}
        await stream.send(msgspec.msgpack.encode(said), NOTICE_CHANNEL)
        return await process.serve(stream, reader)

    def signal(self, body: Body) -> Body:
        """processes.signal."""
        number = body.get("signal")
        if type(number) is not int or not 1 <= number <= 64:
            raise Fault(FaultCode.INVALID_ARGUMENT, "no such signal")
        self._find(body).signal(number)
        return {}

    def resize(self, body: Body) -> Body:
        """processes.resize."""
        process = self._find(body)
        size = (body.get("cols"), body.get("rows"))
        if not process.pty or not all(type(n) is int and 1 <= n <= 4096 for n in size):
            raise Fault(FaultCode.INVALID_ARGUMENT, "it has no terminal, or none can have this size")
        process.resize(body["cols"], body["rows"])
        return {}

    def list(self) -> Body:
        """processes.list."""
        return {"processes": [_entry(process) for process in self.living()]}

    def _find(self, body: Body, *, ended: bool = False) -> FakeProcess:
        self._forget()
        wanted = body.get("process")
        if type(wanted) not in {int, str} or (type(wanted) is int and not 0 < wanted < 2**31):
            raise Fault(FaultCode.INVALID_ARGUMENT, "process must be a pid or a tag")
        for process in sorted(self.all.values(), key=lambda one: (one.reply is not None, -one.pid)):
            if wanted in {process.pid, process.tag or None} and (ended or process.reply is None):
                return process
        raise Fault(FaultCode.NOT_FOUND, "no such process")

    def _forget(self) -> None:
        """Keep the end of detached ones for a while, of others not at all."""
        ended = [process for process in self.all.values() if process.reply is not None]
        kept = sorted((one for one in ended if one.detached), key=lambda one: one.ended_at)[-KEPT:]
        oldest = trio.current_time() - KEPT_SECONDS
        for process in ended:
            if process not in kept or process.ended_at < oldest:
                del self.all[process.pid]


def _entry(process: FakeProcess) -> dict[str, Any]:
    body = process.body
    entry: dict[str, Any] = {"pid": process.pid, "cmd": body.get("cmd", ""), "user": body.get("user", "root")}
    entry |= {"cwd": body.get("cwd", "/"), "background": process.background, "started_ns": process.started_ns}
    return entry | {name: body[name] for name in ("tag", "args") if name in body}


def _answering(output: bytes, code: int) -> LiveProgram:
    async def run(process: Process) -> int:
        await process.write(output)
        return code

    return run
