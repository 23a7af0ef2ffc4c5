"""The QEMU command line, without QEMU."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from agent.vmm.driver import VmSpec
from agent.vmm.qemu_command import Accelerator, Inherited, overlay_node, qemu_command

SPEC = VmSpec(
    sandbox_id="sb1",
    directory=Path("/state/sb1"),
    vcpus=2,
    memory_mb=256,
    kernel=Path("/images/vmlinux"),
    initramfs=Path("/images/initramfs"),
    disk=Path("/state/sb1/disk,x.qcow2"),
    disk_format="qcow2",
    tap_fd=9,
    mac="02:00:00:00:00:01",
    uid=1000,
    gid=1000,
    kernel_arguments=("init=/x", "quiet"),
)
TCG = Accelerator("tcg", tsc_khz=2_600_000)


def command(spec=SPEC, accelerator=TCG, chain=(), **options):
    inherited = Inherited(control=5, events=6, chain=chain)
    return qemu_command(spec, binary=Path("/usr/bin/qemu"), accelerator=accelerator, inherited=inherited, **options)


def values(command, option):
    return [value for name, value in itertools.pairwise(command) if name == option]


def test_without_kvm_the_guest_is_told_its_clock():
    """Calibration fails on a busy host: all three arguments are mandatory, and follow no probing."""
    (append,) = values(command(), "-append")
    assert {"tsc_early_khz=2600000", "tsc=reliable", "no_timer_check"} <= set(append.split())
    assert append.endswith(" init=/x quiet")


def test_an_emulated_guest_does_not_copy_memory_a_byte_at_a_time():
    """A kernel that is told of fast `rep movsb` uses it for everything; emulated it is the slowest way there is."""
    (cpu,) = values(command(), "-cpu")
    assert "-erms" in cpu.split(",")


def test_with_kvm_the_guest_has_its_own_clock():
    """kvm-clock is better than any number of ours."""
    (append,) = values(command(accelerator=Accelerator("kvm")), "-append")
    assert "tsc" not in append
    assert values(command(accelerator=Accelerator("kvm")), "-accel") == ["kvm"]
    assert values(command(accelerator=Accelerator("kvm")), "-cpu") == ["host"]


def test_a_comma_in_a_path_starts_no_option():
    """Paths are passed as JSON: whoever chooses a directory's name chooses no QEMU options."""
    (node,) = values(command(), "-blockdev")
    assert json.loads(node)["file"]["filename"] == "/state/sb1/disk,x.qcow2"


def test_disk_errors_reach_the_guest():
    """Both kinds; QEMU's default would stop the VM when the host's disk is full."""
    device = json.loads(values(command(), "-device")[0])
    assert (device["werror"], device["rerror"]) == ("report", "report")


def test_the_system_call_filter_is_complete():
    """Every part of it, always."""
    assert values(command(), "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]


def test_the_disks_chain_is_given_whole():
    """Base, layers, overlay: each on the one before, the lower ones read-only, by descriptor and not locked."""
    spec = replace(SPEC, base=Path("/images/root.ext4"), layers=(Path("/layers/a.qcow2"), Path("/layers/b.qcow2")))
    given = command(spec, chain=(7, 8, 9))
    assert values(given, "-add-fd") == ["fd=7,set=0", "fd=8,set=1", "fd=9,set=2"]
    node = json.loads(values(given, "-blockdev")[0])
    assert node["file"]["filename"] == "/state/sb1/disk,x.qcow2"
    below = []
    while (node := node.get("backing")) is not None:
        file = node["file"]
        assert (node["read-only"], file["read-only"], file["locking"]) == (True, True, "off")
        below.append((node["driver"], file["filename"]))
    assert below == [("qcow2", "/dev/fdset/2"), ("qcow2", "/dev/fdset/1"), ("raw", "/dev/fdset/0")]


def test_a_restored_vm_waits_for_its_state():
    """No kernel is loaded, nothing is executed; all else is as it was when the VM was saved."""
    booted, restored = list(command()), list(command(restored=True))
    assert values(restored, "-incoming") == ["defer"]
    at = restored.index("-incoming")
    assert restored[at : at + 3] == ["-incoming", "defer", "-S"]
    del restored[at : at + 3]
    at = booted.index("-kernel")
    assert booted[at : at + 6 : 2] == ["-kernel", "-initrd", "-append"]
    del booted[at : at + 6]
    assert booted == restored


def test_a_pivots_overlay_stands_on_nothing():
    """QEMU puts it on the disk as it is; whatever the file itself names is not opened."""
    node = overlay_node(Path("/state/sb1/next.qcow2"), "disk-1")
    assert node["backing"] is None
    assert node["file"]["node-name"] == "disk-1-file"


@pytest.mark.parametrize(
    "change",
    [
        {"disk": Path("disk.raw")},
        {"kernel": Path("vmlinux")},
        {"directory": Path("here")},
        {"base": Path("root.ext4")},
        {"base": Path("/root.ext4"), "layers": (Path("a.qcow2"),)},
        {"layers": (Path("/a.qcow2"),)},
        {"base": Path("/root.ext4"), "disk_format": "raw"},
        {"vcpus": 0},
        {"memory_mb": 0},
        {"sandbox_id": "../up"},
        {"sandbox_id": "a,b"},
        {"sandbox_id": ""},
        {"kernel_arguments": ("a b",)},
        {"kernel_arguments": ("a\nb",)},
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(change):
    """Relative paths, nothing to run on, an id that would name another group or option, arguments that are several."""
    with pytest.raises(ValueError):
        replace(SPEC, **change)
