"""What a starting agent does with what it finds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from sandbox_world import sandbox_id

from agent.sandboxes.adoption import StateDirectoryInUse, lock_state_directory

ONE, TWO, THREE = (sandbox_id(number) for number in range(1, 4))


async def test_a_running_sandbox_is_adopted(host, autojump_clock):
    """Same VM, same address, same slot; calls work, it is told to be running, and it can be destroyed."""
    async with host.agent() as agent:
        state = await agent.create(ONE, vcpus=3, memory_mb=256)
        process = host.vms.machine(ONE).process
        agent.kill()
    async with host.agent() as agent, agent.connection() as control_plane:
        listing = await control_plane.call("host.list", {}, timeout=5)
        (found,) = listing["sandboxes"]
        for field in ("sandbox_id", "status", "vcpus", "memory_mb", "disk_mb", "host_ip", "started_at"):
            assert found[field] == getattr(state, field)
        assert host.vms.machine(ONE).process == process
        answer = await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "true"}, timeout=5)
        assert answer["exit_code"] == 0
        await agent.check()
        await agent.destroy(ONE)
        await agent.check()


async def test_recorded_image_paths_are_used(host, autojump_clock, monkeypatch):
    """An image that was replaced since does not change the sandboxes that run from the old one."""
    async with host.agent() as agent:
        await agent.create(ONE)
        before = host.vms.machine(ONE).spec
    host.add_image("minimal", digest="b" * 64)
    specs = []
    adopt = type(host.vms).adopt

    async def remember(driver, spec, process):
        specs.append(spec)
        return await adopt(driver, spec, process)

    monkeypatch.setattr(type(host.vms), "adopt", remember)
    async with host.agent() as agent:
        await agent.create(TWO)
        assert "b" * 64 in str(host.vms.machine(TWO).spec.kernel)
    (spec,) = specs
    assert (spec.kernel, spec.initramfs) == (before.kernel, before.initramfs)
    assert "a" * 64 in str(spec.kernel)


async def test_memory_of_adopted_sandboxes_counts(host, autojump_clock):
    """Admission goes on where the last agent stopped."""
    async with host.agent(memory_mb=1000) as agent:
        await agent.create(ONE, memory_mb=700)
    async with host.agent(memory_mb=1000) as agent:
        with pytest.raises(Exception, match="828 of 1000 MiB"):
            await agent.create(TWO, memory_mb=400)


DAMAGES = ["cut", "empty", "missing", "garbage", "another's", "impossible", "no slot", "no process", "directory"]


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_record_is_collected(host, autojump_clock, damage):
    """Its VM is ended, its directory and slot go; the others are not touched, and the agent starts."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.create(TWO)
    file = host.state.directory(ONE) / "record.json"
    data = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "empty":
            file.write_bytes(b"")
        case "missing":
            file.unlink()
        case "garbage":
            file.write_bytes(b"\xff\x00{" * 100)
        case "another's":
            file.write_bytes((host.state.directory(TWO) / "record.json").read_bytes())
        case "impossible":
            host.change_record(ONE, vcpus=0)
        case "no slot":
            host.change_record(ONE, slot=0)
        case "no process":
            host.change_record(ONE, process=None)
        case "directory":
            file.unlink()
            file.mkdir()
            (file / "x").touch()
            file.rename(file.with_name("x"))
            file.with_name("record.json").symlink_to("x")
    async with host.agent() as agent:
        assert agent.statuses().keys() == {TWO}
        await agent.check()


async def test_what_is_not_ours_is_left_alone(host, autojump_clock):
    """`lost+found`, an operator's notes, files and links: not collected, and not in anybody's way."""
    for name in ("lost+found", "NOTES", ONE.upper().replace("0", "A"), f"{ONE}\n"):
        (host.state.sandboxes / name).mkdir()
    host.state.directory(ONE).write_bytes(b"x")
    host.state.directory(TWO).symlink_to("/nonexistent")
    host.state.directory(THREE).symlink_to(host.root)
    before = host.directories()
    async with host.agent() as agent:
        assert agent.statuses() == {}
    assert host.directories() == before


async def test_two_records_with_one_slot(host, autojump_clock):
    """It cannot be; if it is, one of the two stays and the agent starts."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.create(TWO)
    host.change_record(TWO, slot=host.state.load()[ONE].slot)
    async with host.agent() as agent:
        assert len(agent.statuses()) == 1
        assert agent.told()[0][1] == "died"
        await agent.check()


async def test_a_vm_of_another_agents_pid_is_not_taken_for_ours(host, autojump_clock):
    """The recorded process has another start time: not adopted, ended as a leftover, its death told."""
    async with host.agent() as agent:
        await agent.create(ONE)
    host.change_record(ONE, process={"pid": host.vms.machine(ONE).process.pid, "start_time": 1})
    async with host.agent() as agent:
        await agent.check()
        assert agent.told() == [(ONE, "died")]
        assert host.running() == set()


async def test_a_vm_whose_directory_has_gone(host, autojump_clock):
    """Found in the process table alone, and ended; one that will not die does not keep the agent from starting."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.create(TWO)
    for name in (ONE, TWO):
        for file in host.state.directory(name).iterdir():
            file.unlink()
        host.state.directory(name).rmdir()
    host.vms.machine(TWO).unkillable = True
    async with host.agent() as agent:
        assert host.running() == {TWO}
        assert agent.statuses() == {}


@pytest.mark.parametrize("phase", ["running", "removing", "paused", "damaged"])
async def test_a_vm_that_hides_is_ended_all_the_same(host, autojump_clock, phase):
    """Taken over by its guest, it does not look like a VMM any more: ended before its slot, and user, are another's."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.create(TWO)
        agent.kill()
    machine = host.vms.machine(ONE)
    machine.hidden = True
    if phase != "running":
        host.change_record(ONE, phase=phase)
    if phase == "paused":
        host.change_record(ONE, process=None)  # as a pause's last record has it
    async with host.agent() as agent:
        assert machine.ended.is_set()
        assert host.running() == {TWO}
        assert agent.slots.statistics().in_use == 1


@pytest.mark.parametrize("noted", [True, False])
async def test_a_hidden_vm_that_will_not_die_keeps_its_slot(host, autojump_clock, noted):
    """Nobody else becomes its user; whether its record names the process or not."""
    async with host.agent() as agent:
        await agent.create(ONE)
        slot = host.state.load()[ONE].slot
        agent.kill()
    machine = host.vms.machine(ONE)
    machine.hidden = machine.unkillable = True
    if not noted:
        host.change_record(ONE, process=None)
    async with host.agent() as agent:
        assert agent.slots.statistics().in_use == 1
        await agent.create(TWO)
        await agent.create(THREE)
        assert slot not in {host.state.load()[name].slot for name in (TWO, THREE)}


async def test_an_adoption_that_fails_for_one(host, autojump_clock):
    """A leftover that cannot be removed stays, with its slot, for the next start."""
    async with host.agent() as agent:
        await agent.create(ONE)
        await agent.create(TWO)
        agent.kill()
    host.vms.machine(ONE).die("gone")
    host.overlays.remove_errors = [OSError("bad disk")]
    async with host.agent() as agent:
        assert agent.statuses().keys() == {TWO}
        assert host.directories() == {ONE, TWO}
        assert agent.slots.statistics().in_use == 2
    async with host.agent() as agent:
        assert agent.told() == [(ONE, "died")]
        await agent.check()


def test_one_agent_per_state_directory(host, tmp_path):
    """A second process is refused at once; when the first has ended, however it ended, it may have it."""
    code = (
        "import sys, time, pathlib; from agent.sandboxes.adoption import lock_state_directory\n"
        "lock_state_directory(pathlib.Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, host.state.root], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(StateDirectoryInUse, match="another agent serves"):
            lock_state_directory(host.state.root)
        other.kill()
    os.close(lock_state_directory(host.state.root))


async def test_the_lock_is_not_inherited(host):
    """Programs that an agent starts (VMMs outlive it) do not hold its lock."""
    descriptor = lock_state_directory(host.state.root)
    try:
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


async def test_directories_can_be_reached_by_vmms(host, autojump_clock):
    """Whatever our umask, a VMM's user can search its way to its directory, and cannot list the others."""
    before = os.umask(0o077)
    try:
        host.state.prepare()
        async with host.agent() as agent:
            await agent.create(ONE)
    finally:
        os.umask(before)
    for path in (host.state.root, host.state.sandboxes, host.state.directory(ONE)):
        assert path.stat().st_mode & 0o777 == 0o711
