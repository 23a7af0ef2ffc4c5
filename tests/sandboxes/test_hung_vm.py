"""A VM that takes no command any more, in the middle of a checkpoint."""

from __future__ import annotations

import pytest
import trio
from sandbox_world import sandbox_id

from agent.sandboxes.pausing import RUN_ON_TIMEOUT
from agent.wire.faults import Fault, FaultCode

ONE, TWO, SNAPSHOT, OTHER = (sandbox_id(number) for number in (1, 2, 100, 101))


async def test_a_vm_that_does_not_go_on_keeps_nobody_waiting(host, autojump_clock):
    """Its checkpoint fails in time and gives its permit to the others; it is told to go on until it does."""
    captures = trio.CapacityLimiter(1)
    async with host.agent(captures=captures) as agent:
        await agent.create(ONE)
        await agent.create(TWO)
        gate = host.vms.hold("resume")
        with trio.fail_after(3 * RUN_ON_TIMEOUT), pytest.raises(Fault) as caught:
            await agent.snapshot(SNAPSHOT, ONE)
        assert (caught.value.code, caught.value.retryable) == (FaultCode.INTERNAL, True)
        assert captures.borrowed_tokens == 0
        await agent.pause(TWO)
        assert host.vms.machine(ONE).paused
        gate.set()
        await agent.check()
        await agent.snapshot(OTHER, ONE)
        await agent.check()
