from __future__ import annotations

import msgspec
import pytest
import trio

from agent.wire.calls import CONTENT_CHANNEL, NOTICE_CHANNEL, STDERR_CHANNEL, STDOUT_CHANNEL
from agent.wire.faults import FaultCode
from capsule import errors

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
