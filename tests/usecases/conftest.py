from __future__ import annotations

from contextlib import contextmanager

import msgspec
import pytest
import trio

from agent.wire.calls import CONTENT_CHANNEL, NOTICE_CHANNEL, STDERR_CHANNEL, STDOUT_CHANNEL
from agent.wire.faults import FaultCode
from capsule import errors
from capsule.db.errors import DatabaseUnavailable

ERROR_OF = {
    FaultCode.BUSY: errors.Busy,
    FaultCode.CANCELLED: errors.HostUnavailable,
    FaultCode.CONFLICT: errors.Conflict,
    FaultCode.DEADLINE_EXCEEDED: errors.HostUnavailable,
    FaultCode.DISK_FULL: errors.DiskFull,
    FaultCode.DRAINING: errors.Busy,
    FaultCode.INTERNAL: errors.HostUnavailable,
    FaultCode.INVALID_ARGUMENT: errors.InvalidRequest,
    FaultCode.INVALID_STATE: errors.InvalidState,
    FaultCode.IO_ERROR: errors.Conflict,
    FaultCode.IS_A_DIRECTORY: errors.IsADirectory,
    FaultCode.NOT_A_DIRECTORY: errors.NotADirectory,
    FaultCode.NOT_A_FILE: errors.NotAFile,
    FaultCode.NOT_FOUND: errors.NotFound,
    FaultCode.NO_CAPACITY: errors.NoHostsAvailable,
    FaultCode.PERMISSION_DENIED: errors.PermissionDenied,
    FaultCode.SIZE_MISMATCH: errors.InvalidRequest,
    FaultCode.SNAPSHOT_DAMAGED: errors.SnapshotDamaged,
    FaultCode.TOO_LARGE: errors.TooLarge,
    FaultCode.TOO_MANY_PROCESSES: errors.TooManyExecs,
    FaultCode.UNAVAILABLE: errors.HostUnavailable,
    FaultCode.UNKNOWN_METHOD: errors.HostUnavailable,
}


class StepCounter(trio.abc.Instrument):
    """Counts the steps of one task, and calls `act` at the end of the n-th, when it waits for something, or
    (`answered`) at the beginning of the next, when it has what it waited for and does not know yet."""

    def __init__(self, number, act, *, answered=False):
        self.task = None
        self.steps = 0
        self._number = number
        self._act = act
        self._answered = answered

    def before_task_step(self, task):
        if task is self.task and self._answered and self.steps == self._number:
            self._act()

    def after_task_step(self, task):
        if task is self.task:
            self.steps += 1
            if self.steps == self._number and not self._answered:
                self._act()


class FailingDatabase:
    """The database, but for the n-th use: refused, or done with the answer lost; or refused from then on for a time."""

    def __init__(self, db, number, how):
        self._db = db
        self._number = number
        self._how = how
        self._back_at = None
        self.uses = 0

    def __getattr__(self, name):
        return getattr(self._db, name)

    async def run(self, fn, *args, **kwargs):
        return await self._use(self._db.run, fn, *args, **kwargs)

    async def transaction(self, fn, *args, **kwargs):
        return await self._use(self._db.transaction, fn, *args, **kwargs)

    async def _use(self, method, *args, **kwargs):
        self.uses += 1
        hit = self.uses == self._number
        if hit and self._how == "away":
            self._back_at = trio.current_time() + 60
        if (self._back_at or 0) > trio.current_time() or (hit and self._how == "refused"):
            await trio.lowlevel.checkpoint()
            raise DatabaseUnavailable("the test says so")
        answer = await method(*args, **kwargs)
        if hit and self._how == "lost":
            raise DatabaseUnavailable("the answer is lost")
        return answer


class Guest:
    """A guest daemon that says what it is told to: steps of a conversation, then a reply."""

    def __init__(self):
        self.asked = []
        self.received = bytearray()
        self.cancelled = trio.Event()
        self.steps = []
        self.reply = {}

    async def __call__(self, method, body, stream):
        self.asked.append((method, body))
        try:
            for step in self.steps:
                await step(stream)
        except trio.Cancelled:
            self.cancelled.set()
            raise
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    def says(self, *steps, reply):
        """Have it answer so."""
        self.steps, self.reply = list(steps), reply

    # steps

    def stdout(self, data):
        return lambda stream: stream.send(data, STDOUT_CHANNEL)

    def stderr(self, data):
        return lambda stream: stream.send(data, STDERR_CHANNEL)

    def content(self, data):
        return lambda stream: stream.send(data, CONTENT_CHANNEL)

    def notice(self, value):
        data = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
        return lambda stream: stream.send(data, NOTICE_CHANNEL)

    def pause(self, seconds):
        async def step(stream):
            await trio.sleep(seconds)

        return step

    def read(self):
        """Everything that is sent, to its end."""

        async def step(stream):
            async for _, data in stream:
                self.received += data

        return step


@pytest.fixture
async def guest(agent):
    """The guest of the host's sandboxes."""
    agent.guest = Guest()
    return agent.guest


@pytest.fixture
async def sandbox(world, plane, agent):
    """The id of a running sandbox."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    return row.id


@pytest.fixture
def error_of():
    """The API's error for each fault of a host or a guest."""
    assert ERROR_OF.keys() == set(FaultCode)
    return ERROR_OF


@pytest.fixture
def interrupted():
    """Runs work and cancels it in its n-th wait; whether there was one."""

    async def interrupted(work, number):
        scope = trio.CancelScope()
        counter = StepCounter(number, scope.cancel)

        async def run():
            counter.task = trio.lowlevel.current_task()
            with scope:
                await work()

        trio.lowlevel.add_instrument(counter)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
        finally:
            trio.lowlevel.remove_instrument(counter)
        return scope.cancelled_caught

    return interrupted


@pytest.fixture
def dying():
    """Kills a control plane in the n-th wait of its next operation."""

    @contextmanager
    def dying(plane, number, *, answered):
        counter = StepCounter(number, plane.kill, answered=answered)
        work = plane.operations._work

        async def watched(*args):
            counter.task = counter.task or trio.lowlevel.current_task()
            await work(*args)

        plane.operations._work = watched
        trio.lowlevel.add_instrument(counter)
        try:
            yield counter
        finally:
            trio.lowlevel.remove_instrument(counter)

    return dying


@pytest.fixture
def failing(world):
    """The database, but for its n-th use."""
    return lambda number, how: FailingDatabase(world.db, number, how)
