"""Creates that need no boot: golden snapshots, when they are made, used, dropped, and given up."""

from __future__ import annotations

from uuid import UUID

import pytest
import trio
from sandbox_world import create_body, sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.sandboxes.golden import LOOK_EVERY, MAX_FAILURES, GoldenSnapshots, Shape, parse_shapes
from agent.sandboxes.working_set import FIRST_TOUCHES
from agent.snapshots.layout import WORKING_SET
from agent.wire.faults import Fault, FaultCode

ONE, TWO, THREE, FOUR = (sandbox_id(number) for number in range(1, 5))
USUAL = (Shape(1, 128),)


def maker(**options):
    """For `host.agent(golden=...)`."""
    return lambda parts: GoldenSnapshots(parts, **{"shapes": USUAL, "limit": 4, **options})


def golden(host):
    return {one.manifest.owner: one for one in host.store().list() if one.manifest.kind == "golden"}


def refused(_body):
    """A program that cannot be run."""
    raise Fault(FaultCode.NOT_FOUND, "there is no user root in this sandbox")


async def test_a_create_is_a_resume(host, autojump_clock):
    """The usual shape is made at the start, from a VM that is gone then; a create starts from it and is its own."""
    async with host.agent(golden=maker()) as agent, agent.connection() as control_plane:
        await wait_all_tasks_blocked()
        assert len(golden(host)) == 1
        assert host.running() == set()
        await agent.check()
        body = create_body(ONE, hostname="mine", envs={"A": "b"})
        state = await control_plane.call("sandbox.create", body, timeout=60)
        assert "load" in state["timings_ms"]
        machine = host.vms.machine(ONE)
        assert machine.restored_from is not None
        configured = host.guests[state["host_ip"]].configured
        assert (configured["hostname"], configured["envs"]) == ("mine", {"A": "b"})
        assert configured["machine_id"] == ONE.replace("-", "")
        await agent.create(TWO)
        assert agent.found.golden == {}
        await agent.pause(ONE)
        await agent.resume(ONE)
        await agent.destroy(ONE)
        await agent.check()
        assert len(golden(host)) == 1


@pytest.mark.parametrize(("options", "runs"), [({}, 2), ({"program": refused}, 1)])
async def test_one_has_run_programs(host, autojump_clock, options, runs):
    """What a first process reads from the disk is in its memory; there is one as well where that does not work."""
    host.guest_options = options
    async with host.agent(golden=maker()):
        await wait_all_tasks_blocked()
        assert len(golden(host)) == 1
        (guest,) = host.guests.values()
        assert guest.calls == ["configure", *["exec"] * runs, "settle"]


async def test_other_shapes_follow_their_first_boot(host, autojump_clock):
    """The first one boots, the second one need not; no more than the limit, the least used one goes."""
    async with host.agent(golden=maker(shapes=(), limit=2)) as agent:
        for number, memory in enumerate((128, 256, 128, 384)):
            name = sandbox_id(10 + number)
            await agent.create(name, memory_mb=memory)
            assert (host.vms.machine(name).restored_from is None) == (number != 2)
            await wait_all_tasks_blocked()
            await agent.check()
        shapes = {one.manifest.memory_mb for one in golden(host).values()}
        assert shapes == {128, 384}, "256 was not used again"


async def test_a_new_image(host, autojump_clock):
    """Gets its own; what belongs to the old one is dropped by the next agent."""
    async with host.agent(golden=maker()) as agent:
        await wait_all_tasks_blocked()
        (old,) = golden(host)
        host.add_image("minimal", digest="b" * 64)
        await trio.sleep(LOOK_EVERY + 1)
        assert len(golden(host)) == 2
        await agent.create(ONE)
        assert "b" * 64 in agent.manager.find(ONE).made.record.rootfs
    async with host.agent(golden=maker()) as agent:
        await wait_all_tasks_blocked()
        assert len(golden(host)) == 1
        assert old not in golden(host)
        await agent.check()


async def test_another_vmm(host, autojump_clock, monkeypatch):
    """A saved state is good for one version: others are dropped, not used."""
    async with host.agent(golden=maker()) as agent:
        await wait_all_tasks_blocked()
        (old,) = golden(host)
    monkeypatch.setattr(host.vms, "version", lambda: "fake 2")
    async with host.agent(golden=maker()) as agent:
        await wait_all_tasks_blocked()
        assert len(golden(host)) == 1
        assert old not in golden(host)
        await agent.create(ONE)
        await agent.check()


@pytest.mark.parametrize("how", ["vm.state", "mem.header", "gone", "restore"])
async def test_one_that_cannot_be_used(host, autojump_clock, how):
    """The create boots, a damaged golden one is forgotten and made anew; nothing is left of the try."""
    async with host.agent(golden=maker()) as agent:
        await wait_all_tasks_blocked()
        (before,) = golden(host).values()
        directory = host.store().snapshot_directory(before.id)
        if how == "gone":
            host.store().remove(before.id)
        elif how == "restore":
            host.vms.fail_next("restore", "no")
        else:
            (directory / how).chmod(0o600)
            (directory / how).write_bytes(b"damaged")
        await agent.create(ONE)
        assert host.vms.machine(ONE).restored_from is None
        assert agent.manager.find(ONE).made.record.base == ""
        await trio.sleep(LOOK_EVERY + 1)
        assert len(golden(host)) == 1
        assert (before.id in {one.id for one in golden(host).values()}) == (how == "restore")
        await agent.create(TWO)
        assert host.vms.machine(TWO).restored_from is not None
        assert agent.statuses() == {ONE: "running", TWO: "running"}


async def test_one_that_is_damaged_again_and_again(host, autojump_clock):
    """Of those that were forgotten one stays for inspection, and after a few no more is made."""
    async with host.agent(golden=maker()) as agent:
        await wait_all_tasks_blocked()
        for number in range(MAX_FAILURES + 1):
            found = {one.id for one in host.store().list()}
            for each in found:
                state = host.store().snapshot_directory(each) / "vm.state"
                state.chmod(0o600)
                state.write_bytes(b"damaged")
            name = sandbox_id(10 + number)
            await agent.create(name)
            assert host.vms.machine(name).restored_from is None
            await trio.sleep(LOOK_EVERY + 1)
            assert len(list(host.store().list())) == (1 if number >= MAX_FAILURES - 1 else 2)


async def test_a_vm_that_could_not_be_served(host, autojump_clock):
    """A tenant can have that as often as it likes: the golden snapshot is used on, and no other is made."""
    async with host.agent(golden=maker()) as agent:
        await wait_all_tasks_blocked()
        before = {one.id for one in golden(host).values()}
        await agent.create(ONE)
        host.pager.fail_vm(ONE, "the VMM does with its memory what cannot be followed", damaged=False)
        host.vms.machine(ONE).die("killed by signal 9")
        await trio.sleep(LOOK_EVERY + 1)
        await agent.create(TWO)
        assert host.vms.machine(TWO).restored_from is not None
        assert {one.id for one in golden(host).values()} == before


async def test_nobody_waits_for_it(host, autojump_clock):
    """A create that needs the memory has the scratch VM given up, and boots; later it is made all the same."""
    host.guest_options = {"boots": False}
    async with host.agent(memory_mb=600, golden=maker(shapes=(Shape(1, 300),))) as agent:
        await wait_all_tasks_blocked()
        assert len(host.running()) == 1
        host.guest_options = {}
        await agent.create(ONE, memory_mb=300)
        await wait_all_tasks_blocked()
        assert host.running() == {ONE}
        assert golden(host) == {}
        await agent.check()
        await agent.destroy(ONE)
        await trio.sleep(LOOK_EVERY + 1)
        assert len(golden(host)) == 1
        await agent.check()


async def test_a_nearly_full_disk(host, autojump_clock):
    """Is not filled with what is only a convenience."""
    host.disk_free_mb = 2100
    async with host.agent(golden=maker()):
        await trio.sleep(200)
        assert golden(host) == {}
        host.disk_free_mb = 10_000
        await trio.sleep(LOOK_EVERY + 1)
        assert len(golden(host)) == 1


async def test_an_image_that_does_not_boot(host, autojump_clock):
    """It is tried a few times, and nothing is left of any."""
    host.guest_options = {"boots": False}
    async with host.agent(golden=maker(), guest_timeout=5.0) as agent:
        await trio.sleep(1000)
        assert len(host.vms.machines) == 3
        assert host.running() == set()
        await agent.check()


async def test_killed_at_every_step_of_making_one(make_host, autojump_clock):
    """The next agent collects the scratch VM and the draft, and makes it anew; creates are not concerned."""
    for point in range(1, 300):
        host = make_host()
        first = await host.live(settle, crash_at=point, golden=maker())
        host.pager.forget_dead()
        last = await host.live(use, golden=maker())
        assert last.finished, f"killed at {point}"
        if first.finished:
            break
    assert point > 20


async def settle(agent):
    await wait_all_tasks_blocked()


async def use(agent):
    await wait_all_tasks_blocked()
    await agent.check()
    assert len(golden(agent.host)) == 1
    await agent.create(ONE)
    assert agent.host.vms.machine(ONE).restored_from is not None
    await agent.check()
    assert not agent.told()


async def test_an_agent_without(host, autojump_clock):
    """Every sandbox boots, and what an earlier agent made stays."""
    async with host.agent(golden=maker()):
        await wait_all_tasks_blocked()
    async with host.agent() as agent:
        await agent.create(ONE)
        assert host.vms.machine(ONE).restored_from is None
        assert len(golden(host)) == 1


async def test_tenants_do_not_change_what_others_start_with(host, autojump_clock):
    """The first run of a copy tells what the next ones will touch; a later one has no say."""
    async with host.agent(golden=maker()) as agent:
        await wait_all_tasks_blocked()
        (source,) = golden(host).values()
        shared = host.store().snapshot_directory(source.id) / WORKING_SET
        for name in (ONE, TWO):
            await agent.create(name)
            own = UUID(agent.manager.find(name).made.record.base)
            written = host.store().snapshot_directory(own) / ".written"
            written.write_text(name)
            written.replace(written.with_name(WORKING_SET))
            await trio.sleep(FIRST_TOUCHES + 1)
            assert shared.read_text() == ONE


def test_shapes():
    """As they are written in the settings."""
    assert parse_shapes("1x512, 2x1024,") == (Shape(1, 512), Shape(2, 1024))
    assert parse_shapes("") == ()
    for bad in ("1", "x", "1x", "0x5", "axb", "1x-2", "1x2x3"):
        with pytest.raises(ValueError, match="not a shape"):
            parse_shapes(bad)


async def test_a_full_host_says_so(host, autojump_clock):
    """No capacity for a start from a golden one is no reason to forget that."""
    host.slot_count = 1
    async with host.agent(golden=maker()) as agent:
        await wait_all_tasks_blocked()
        (before,) = golden(host)
        await agent.create(ONE)
        with pytest.raises(Fault, match="no free network slot"):
            await agent.create(TWO)
        await agent.destroy(ONE)
        await wait_all_tasks_blocked()
        await agent.create(THREE)
        assert host.vms.machine(THREE).restored_from is not None
        assert list(golden(host)) == [before]
