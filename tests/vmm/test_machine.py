"""What is found out about the machine: KVM, the clock's speed, control groups."""

from __future__ import annotations

import os
import shutil

import pytest
import trio

from agent.vmm import kvm, tsc
from agent.vmm.cgroup import CgroupTree
from agent.vmm.driver import VmmUnavailable
from agent.vmm.kvm import kvm_group, probe_kvm
from agent.vmm.qemu import detect_qemu


async def test_the_kvm_probe_always_answers():
    """On any machine: an answer with a reason, in bounded time, and this process unharmed."""
    with trio.fail_after(60):
        answer = await probe_kvm()
    assert answer.reason
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert not answer.usable


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(1000)", "hung"),
        ("import os; os.abort()", "died"),
        ("print('exit reason 17'); raise SystemExit(1)", "exit reason 17"),
    ],
)
async def test_a_hypervisor_that_hangs_or_crashes_is_not_used(tmp_path, monkeypatch, program, reason):
    """The probe runs apart: whatever happens to it is an answer."""
    path = tmp_path / "probe.py"
    path.write_text(program)
    monkeypatch.setattr(kvm, "PROBE", path)
    monkeypatch.setattr(kvm, "PROBE_TIMEOUT", 2.0 if reason == "hung" else 60.0)
    answer = await probe_kvm()
    assert not answer.usable
    assert reason in answer.reason


def test_who_may_open_kvm(tmp_path):
    """By group, by everybody, or only by root: then VMs cannot, and the message says how to change it."""
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o660)
    assert kvm_group(device) == device.stat().st_gid
    device.chmod(0o666)
    assert kvm_group(device) is None
    device.chmod(0o600)
    with pytest.raises(PermissionError, match="chmod 660"):
        kvm_group(device)


def test_both_ways_to_the_clocks_speed_agree():
    """Asking KVM and measuring: the same, but for a fraction of a percent. A busy machine may spoil a measurement."""
    assert 100_000 < tsc._measure() < 20_000_000
    assert any(tsc.tsc_khz() == pytest.approx(tsc._measure(), rel=0.005) for _ in range(10))


async def test_without_qemu_the_remedy_is_said(monkeypatch):
    """No QEMU on this machine: what to install."""
    monkeypatch.setattr(shutil, "which", lambda _program: None)
    with pytest.raises(VmmUnavailable, match="apt-get install qemu-system-x86"):
        await detect_qemu()


@pytest.fixture
def mount(tmp_path):
    """Files like those of a version 2 hierarchy with both controllers."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    (tmp_path / "cgroup.subtree_control").touch()
    group = tmp_path / "capsule" / "one"
    group.mkdir(parents=True)
    for file in ("memory.max", "memory.swap.max", "pids.max", "cgroup.procs", "cgroup.kill"):
        (group / file).touch()
    return tmp_path


def test_limits_are_set_before_the_process_comes_in(mount):
    """Memory and processes bounded, no swap; a limit the kernel does not know is left out."""
    CgroupTree(mount).add("one", 4711, memory_bytes=1 << 30, processes=256)
    group = mount / "capsule" / "one"
    contents = {path.name: path.read_text() for path in group.iterdir()}
    assert contents == {
        "memory.max": str(1 << 30),
        "memory.swap.max": "0",
        "pids.max": "256",
        "cgroup.procs": "4711",
        "cgroup.kill": "",
    }
    assert (mount / "capsule" / "cgroup.subtree_control").read_text() == "+pids"


def test_an_out_of_memory_kill_is_known(mount):
    """The kernel counts them per group."""
    tree = CgroupTree(mount)
    assert not tree.was_out_of_memory("one")
    (mount / "capsule" / "one" / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert tree.was_out_of_memory("one")


@pytest.mark.parametrize("missing", [None, "/nonexistent"])
def test_without_control_groups_everything_still_works(missing, tmp_path):
    """No hierarchy, or one that cannot be written: said in the log, not fatal."""
    tree = CgroupTree(tmp_path / missing if missing else None)
    tree.add("one", 4711, memory_bytes=1, processes=1)
    tree.remove("one")
    tree.remove_empty()
    assert not tree.was_out_of_memory("one")


def test_only_empty_groups_are_leftovers(tmp_path):
    """A group in use stays (the kernel refuses), an empty one goes."""
    (tmp_path / "capsule" / "used" / "file").mkdir(parents=True)
    (tmp_path / "capsule" / "unused").mkdir()
    CgroupTree(tmp_path).remove_empty()
    assert [path.name for path in (tmp_path / "capsule").iterdir()] == ["used"]
