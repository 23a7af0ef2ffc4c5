"""What every call into a sandbox meets first: whose it is, whether it runs, whether it is really there."""

from __future__ import annotations

from itertools import product

import pytest
import trio

from agent.wire.lifecycle import Status
from capsule import errors
from capsule.model import ExecCall


async def nothing():
    for chunk in ():
        yield chunk


async def read(sandboxes, who, one):
    async with sandboxes.read_file(who, one, "/f") as (_, chunks):
        async for _ in chunks:
            pass


CALLS = {
    "exec": lambda s, who, one: s.exec(who, one, ExecCall(cmd="true", envs={})),
    "ping": lambda s, who, one: s.ping(who, one),
    "processes": lambda s, who, one: s.processes(who, one),
    "signal": lambda s, who, one: s.signal_process(who, one, 1, 9),
    "write": lambda s, who, one: s.write_file(who, one, "/f", 0, nothing()),
    "read": read,
    "list": lambda s, who, one: s.list_files(who, one, "/", 1),
    "mkdir": lambda s, who, one: s.mkdir(who, one, "/d"),
    "remove": lambda s, who, one: s.remove_file(who, one, "/f"),
}


async def test_another_teams_is_not_found(virtual_clock, world, agent, plane, sandbox):
    """And neither host nor clock is touched."""
    other = await world.add_team()
    for call in CALLS.values():
        with pytest.raises(errors.NotFound):
            await call(plane.sandboxes, other, sandbox)
    assert agent.asked == []


async def test_one_that_does_not_run(virtual_clock, world, agent, plane):
    """409 with the status, without asking the host."""
    rows = {status: await world.insert(agent, status.value) for status in Status if status != Status.RUNNING}
    for (status, row), call in product(rows.items(), CALLS.values()):
        with pytest.raises(errors.InvalidState, match=status.value) as caught:
            await call(plane.sandboxes, world.principal, row.id)
        assert caught.value.extra == {"status": status}
    assert agent.asked == []


async def test_one_whose_vm_is_gone(virtual_clock, world, agent, plane, sandbox):
    """The row does not know yet: 409, not 404, since the sandbox is there."""
    agent.vms.clear()
    for call in CALLS.values():
        with pytest.raises(errors.InvalidState):
            await call(plane.sandboxes, world.principal, sandbox)


async def test_one_whose_host_is_away(virtual_clock, world, agent, plane, sandbox):
    """503 within the time of a connection."""
    agent.cut_off()
    for call in CALLS.values():
        began = trio.current_time()
        with pytest.raises(errors.HostUnavailable) as caught:
            await call(plane.sandboxes, world.principal, sandbox)
        assert ":7001" not in caught.value.message
        assert trio.current_time() - began < 10


async def test_one_whose_end_is_told(virtual_clock, world, agent, plane):
    """`reason` is part of the refusal."""
    row = await world.insert(agent, "running")
    await world.sql(
        "update sandboxes set status = 'error', generation = generation + 1, reason = 'qemu died', host_ip = null"
        " where id = $1",
        row.id,
    )
    with pytest.raises(errors.InvalidState, match="error: qemu died; create a new one"):
        await plane.sandboxes.ping(world.principal, row.id)
