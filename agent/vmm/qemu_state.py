"""Saving and loading the state of a QEMU's CPUs and devices: QEMU's migration stream, without the memory.

The capability `x-ignore-shared` leaves shared memory out of the stream, so that tens of kilobytes are left. QEMU
writes them to a pipe and we write the file: no VMM ever holds a file of a snapshot open for writing, and none can
fill the disk.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from agent.vmm.driver import VmStateFailed
from agent.vmm.qmp import QmpError, QmpRefused, QmpViolation

if TYPE_CHECKING:
    from agent.vmm.qmp import QmpClient

MAX_STATE_BYTES = 16 * 1024 * 1024
"""Far more than any machine of ours has: 63 KB with one vCPU."""

DESCRIPTOR = "state"
"""What QEMU calls the descriptor we give it."""

SAVE_TIMEOUT = 30.0
"""Seconds; 10 ms are usual, a busy disk flushes what the guest has written."""

COMMAND_TIMEOUT = 5.0
POLL_INTERVAL = 0.002
RECEIVE_BYTES = 64 * 1024

UNFINISHED = frozenset({"setup", "active", "device", "pre-switchover", "cancelling"})
"""States of a migration that is still to end."""


class _Stream:
    """What QEMU writes, read as it comes: QEMU may hold its big lock while it writes, and then answers nothing."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.failure: VmStateFailed | None = None

    async def receive(self, reading: int) -> None:
        with trio.move_on_after(SAVE_TIMEOUT) as scope:
            async with trio.lowlevel.FdStream(reading) as pipe:
                while len(self.content) <= MAX_STATE_BYTES and (chunk := await pipe.receive_some(RECEIVE_BYTES)):
                    self.content += chunk
        if scope.cancelled_caught:
            self.failure = VmStateFailed(f"QEMU has not written its state within {SAVE_TIMEOUT:g} s")
        elif len(self.content) > MAX_STATE_BYTES:
            self.failure = VmStateFailed(f"QEMU has written more than {MAX_STATE_BYTES} bytes of state")


async def save(client: QmpClient) -> bytes:
    """Return the state of a paused machine.

    Raises QmpError, VmStateFailed; then `cancel` must follow, as when cancelled.
    """
    await _leave_memory_out(client)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        await client.give(DESCRIPTOR, writing, timeout=COMMAND_TIMEOUT)
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    stream = _Stream()
    refused: QmpError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.receive, reading)
        try:
            await client.execute("migrate", timeout=SAVE_TIMEOUT, uri=f"fd:{DESCRIPTOR}")
        except QmpError as error:
            refused = error
            nursery.cancel_scope.cancel()
    if failure := refused or stream.failure:
        raise failure
    await _wait_saved(client)
    return bytes(stream.content)


async def cancel(client: QmpClient) -> None:
    """End a save that was given up, so that the machine can go on. Raises QmpError; no deadline of its own."""
    with suppress(QmpRefused):  # it has been taken already
        await client.execute("closefd", timeout=COMMAND_TIMEOUT, fdname=DESCRIPTOR)
    await client.execute("migrate_cancel", timeout=COMMAND_TIMEOUT)
    while True:
        if (await client.execute("query-migrate", timeout=COMMAND_TIMEOUT)).get("status") not in UNFINISHED:
            return
        await trio.sleep(POLL_INTERVAL)


async def load(client: QmpClient, state: int) -> None:
    """Load the state behind a descriptor into a machine that waits for it. Raises QmpError.

    QEMU ends when it cannot. No deadline of its own: QEMU may have to wait for memory, and answers nothing meanwhile.
    """
    await client.give(DESCRIPTOR, state, timeout=math.inf)
    await _leave_memory_out(client)
    await client.execute("migrate-incoming", timeout=math.inf, uri=f"fd:{DESCRIPTOR}")
    while True:
        answer = await client.execute("query-status", timeout=math.inf)
        if not isinstance(answer, dict) or "status" not in answer:
            raise QmpViolation("QEMU does not tell its status")
        if answer["status"] != "inmigrate":
            return
        await trio.sleep(POLL_INTERVAL)


async def _leave_memory_out(client: QmpClient) -> None:
    capability = {"capability": "x-ignore-shared", "state": True}
    await client.execute("migrate-set-capabilities", timeout=COMMAND_TIMEOUT, capabilities=[capability])


async def _wait_saved(client: QmpClient) -> None:
    """QEMU has closed its end: it is done, or will be in a moment."""
    with trio.move_on_after(SAVE_TIMEOUT):
        while True:
            answer = await client.execute("query-migrate", timeout=COMMAND_TIMEOUT)
            if answer.get("status") == "completed":
                return
            if answer.get("status") not in UNFINISHED:
                reason = answer.get("error-desc", answer.get("status"))
                raise VmStateFailed(f"QEMU could not save its state: {reason}")
            await trio.sleep(POLL_INTERVAL)
    raise VmStateFailed(f"QEMU has not finished saving within {SAVE_TIMEOUT:g} s")
