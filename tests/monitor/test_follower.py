"""Following one host: rows become what the host says, soon; nothing it says is lost, and nothing it says breaks us."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from uuid import uuid4

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from capsule.db.errors import DatabaseUnavailable
from capsule.db.queries import sandboxes
from capsule.monitor import host as module
from capsule.monitor.host import INTERVAL, STRANGER_GRACE


async def test_the_death_of_a_vm_reaches_its_row_at_once(virtual_clock, world, agent, follow, status):
    """Within a second, through the watch; with the reason, and acknowledged."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    await follow()
    agent.die(row.id, "qemu ended\nwith code 1\x00")
    assert (await status(row.id, "error", 1)).reason == "qemu ended with code 1"
    await trio.sleep(1)
    assert agent.outbox == []


async def test_everything_is_looked_at_once_and_again(virtual_clock, world, agent, follow, status):
    """What changed while nobody looked shows at the start; what no notice told of, within an interval."""
    missing, gone = await world.insert(agent, "missing"), await world.insert(agent, "running")
    agent.add_vm(missing.id)
    await follow()
    assert (await status(missing.id, "running", 1)).host_ip == "10.11.0.1"
    await status(gone.id, "error", 1)
    del agent.vms[str(missing.id)]
    await status(missing.id, "error", INTERVAL + 1)


async def test_an_address_that_is_not_the_rows(virtual_clock, world, agent, follow):
    """It runs as the row says, elsewhere: the row learns where, and nothing else of it changes."""
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    agent.vms[str(row.id)]["host_ip"] = "10.11.1.9"
    await follow()
    await trio.sleep(1)
    after = await world.row(row.id)
    assert (str(after.host_ip), after.generation, after.last_updated) == ("10.11.1.9", row.generation, row.last_updated)


async def test_a_burst_of_changes_is_one_look(virtual_clock, world, agent, follow):
    """However many notices come while we look, the next look sees them all."""
    await follow()
    gate = agent.hold("host.list")
    agent.changed()
    await agent.reached["host.list"].wait()
    before = sum(method == "host.list" for method, _ in agent.asked)
    for _ in range(100):
        agent.changed()
        await trio.sleep(0.001)
    gate.set()
    await trio.sleep(1)
    assert sum(method == "host.list" for method, _ in agent.asked) - before <= 2


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_sandbox_made_while_we_look(virtual_clock, world, agent, follow, moment):
    """Trap 10: made, row and VM, just before or just after the rows were read: neither is touched, whatever the listing
    says. (A listing from before the rows would show a fresh sandbox without its VM.)"""
    made = []

    class Interleaved:
        def __getattr__(self, name):
            return getattr(world.db, name)

        async def run(self, fn, *args, **kwargs):
            if fn is not sandboxes.on_host:
                return await world.db.run(fn, *args, **kwargs)
            if moment == "before":
                await make()
            rows = await world.db.run(fn, *args, **kwargs)
            if moment == "after":
                await make()
            return rows

    async def make():
        if len(made) < 5:
            row = await world.insert(agent, "running")
            made.append(row.id)
            agent.add_vm(row.id)

    await follow(Interleaved())
    await trio.sleep(STRANGER_GRACE + INTERVAL)
    assert len(made) == 5
    assert {(await world.row(one)).status for one in made} == {"running"}
    assert set(agent.vms) == {str(one) for one in made}


async def test_a_row_changed_after_the_rows_were_read(virtual_clock, world, agent, follow, status):
    """The step is for the row as it was read: a newer truth stays; what the outbox told is not lost by that."""
    row = await world.insert(agent, "starting")
    agent.add_vm(row.id)
    gate = agent.hold("host.list")
    await follow()
    await agent.reached["host.list"].wait()
    await world.sql(
        """update sandboxes set status = 'running', generation = generation + 1, transition_deadline = null
           where id = $1""",
        row.id,
    )
    agent.die(row.id, "it died young")
    acknowledged = agent.hold("host.acknowledge")
    gate.set()
    assert (await status(row.id, "error", 1)).reason == "it died young"
    acknowledged.set()
    await trio.sleep(1)
    assert agent.outbox == []


async def test_a_stranger_without_a_row(virtual_clock, world, agent, follow):
    """It has the grace, not more; one that got its row meanwhile stays."""
    await follow()
    stranger, late = uuid4(), uuid4()
    agent.add_vm(stranger)
    agent.add_vm(late)
    await trio.sleep(STRANGER_GRACE - 5)
    assert str(stranger) in agent.vms
    await world.insert(agent, "running", sandbox=late)
    await trio.sleep(5 + 2 * INTERVAL)
    assert list(agent.vms) == [str(late)]


async def test_a_stranger_that_comes_and_goes_has_its_grace_anew(virtual_clock, world, agent, follow):
    """What is counted is how long it has been there without a break."""
    await follow()
    stranger = uuid4()
    agent.add_vm(stranger)
    await trio.sleep(STRANGER_GRACE - 5)
    agent.forget(stranger)
    await trio.sleep(INTERVAL + 1)
    agent.add_vm(stranger)
    await trio.sleep(STRANGER_GRACE - 5)
    assert str(stranger) in agent.vms


@pytest.mark.parametrize("final", ["stopped", "error"])
async def test_a_vm_whose_row_has_ended(virtual_clock, world, agent, follow, final):
    """Its end is long decided."""
    row = await world.insert(agent, final)
    await follow()
    agent.add_vm(row.id)
    await trio.sleep(1)
    assert agent.vms == {}
    assert (await world.row(row.id)).status == final


async def test_a_vm_whose_row_is_of_another_host(virtual_clock, world, agent, follow):
    """It is ended here, where it does not belong; there it is left alone."""
    other = await world.add_host()
    row = await world.insert(other, "running")
    other.add_vm(row.id)
    agent.add_vm(row.id)
    agent.tell(row.id, "a lie")
    await follow()
    await trio.sleep(2)
    assert (agent.vms, list(other.vms)) == ({}, [str(row.id)])
    assert (await world.row(row.id)).status == "running"
    assert agent.outbox == []


async def test_a_vm_on_a_machine_that_became_another_host(virtual_clock, world, agent, follow):
    """Its row is of a host that does not have it, or does not answer: this may be the VM itself, and it stays. Once
    that host has it, or the row has ended, it goes."""
    other = await world.add_host()
    moved, ended = [await world.insert(other, "running") for _ in range(2)]
    for one in (moved, ended):
        agent.add_vm(one.id)
    other.cut_off()
    await follow()
    await trio.sleep(STRANGER_GRACE + 2 * INTERVAL)
    assert len(agent.vms) == 2
    other.come_back()
    await trio.sleep(2 * STRANGER_GRACE)
    assert len(agent.vms) == 2
    assert sum(method == "host.list" for method, _ in other.asked) < 10
    other.add_vm(moved.id)
    await world.sql("update sandboxes set status = 'error', generation = 4, host_ip = null where id = $1", ended.id)
    await trio.sleep(STRANGER_GRACE + 2 * INTERVAL)
    assert (agent.vms, list(other.vms)) == ({}, [str(moved.id)])


async def test_a_destroy_that_nobody_finished(virtual_clock, world, agent, follow, status):
    """Somebody is at work until the deadline; then it is ours."""
    row = await world.insert(agent, "stopping", deadline=timedelta(seconds=20))
    agent.add_vm(row.id)
    await follow()
    await trio.sleep(15)
    assert str(row.id) in agent.vms
    await status(row.id, "stopped", 2 * INTERVAL)
    assert agent.vms == {}


async def test_one_that_does_not_end_holds_up_no_other(virtual_clock, world, agent, follow, status):
    """A destroy that hangs, and one that fails: other rows go on at once; both are asked again."""
    stuck, row = await world.insert(agent, "stopped"), await world.insert(agent, "running")
    agent.add_vm(stuck.id)
    agent.add_vm(row.id)
    gate = agent.hold("sandbox.destroy")
    await follow()
    await agent.reached["sandbox.destroy"].wait()
    agent.die(row.id)
    await status(row.id, "error", 1)
    await trio.sleep(60)
    assert sum(method == "sandbox.destroy" for method, _ in agent.asked) >= 2
    gate.set()
    agent.faults["sandbox.destroy"] = [Fault(FaultCode.INTERNAL, "device busy")] * 2
    await trio.sleep(5 * INTERVAL)
    assert agent.vms == {}


async def test_killed_between_the_row_and_the_acknowledgement(virtual_clock, world, agent, follow, status):
    """The entry is there for the next one, and does no harm a second time."""
    row = await world.insert(agent, "running")
    gate = agent.hold("host.acknowledge")
    agent.tell(row.id, "it died")
    first = await follow()
    await agent.reached["host.acknowledge"].wait()
    before = await status(row.id, "error", 1)
    first.cancel()
    assert len(agent.outbox) == 1
    gate.set()
    await follow()
    assert agent.outbox == []
    assert await world.row(row.id) == before


async def test_nothing_is_acknowledged_that_is_not_written(virtual_clock, world, agent, follow, status):
    """While the database refuses writes the host keeps what it has to tell."""

    class ReadOnly:
        refuses = True

        def __getattr__(self, name):
            return getattr(world.db, name)

        async def transaction(self, fn, *args, **kwargs):
            if self.refuses and fn is module._change:
                await trio.lowlevel.checkpoint()
                raise DatabaseUnavailable("read only")
            return await world.db.transaction(fn, *args, **kwargs)

    db = ReadOnly()
    row = await world.insert(agent, "running")
    await follow(db)
    agent.tell(row.id, "it died")
    await trio.sleep(20)
    assert len(agent.outbox) == 1
    db.refuses = False
    assert (await status(row.id, "error", 5)).reason == "it died"
    await trio.sleep(1)
    assert agent.outbox == []


async def test_an_outbox_of_hundreds(virtual_clock, world, agent, follow):
    """Read in portions, all of it."""
    rows = [await world.insert(agent, "running") for _ in range(3)]
    for number in range(450):
        agent.tell(rows[number % 3].id if number % 100 == 0 else uuid4(), f"entry {number}")
    await follow()
    await trio.sleep(2)
    assert agent.outbox == []
    assert {(await world.row(row.id)).status for row in rows} == {"error"}


async def test_an_agent_that_comes_and_goes(virtual_clock, world, agent, follow, status):
    """Cut off, restarted, draining: it is followed again as soon as it is back."""
    await follow()
    for disturb in (agent.restart, agent.drop_connections, agent.cut_off):
        row = await world.insert(agent, "running")
        agent.add_vm(row.id)
        disturb()
        await trio.sleep(5)
        agent.come_back()
        await trio.sleep(20)
        with suppress(KeyError):
            agent.die(row.id)
        await status(row.id, "error", 1)
