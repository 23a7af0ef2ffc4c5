from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.doctor import checks
from agent.doctor.checks import CHECKS, GIB, Subject, run_checks
from agent.doctor.machine import Machine, Ran
from agent.doctor.report import Check, exit_code, render
from agent.images.files import digest_file, exclusive
from agent.images.store import Artifact, ImageStore, Parts

if TYPE_CHECKING:
    from collections.abc import Callable

HEALTHY_FILES = {
    "/proc/sys/net/ipv4/ip_forward": "1\n",
    "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
    "/proc/misc": "236 device-mapper\n",
    "/proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   16777216 kB\n",
}


@dataclass
class FakeMachine(Machine):
    """A machine where everything is as told; `without` are programs that are not there, or fail with these words."""

    files: dict[str, str] = field(default_factory=lambda: dict(HEALTHY_FILES))
    without: dict[str, str] = field(default_factory=dict)
    release: str = "6.1.0"
    qemu: str = "QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright"
    machines: str = "microvm  microvm (i386)"
    error: str = ""
    free: int = 100 * GIB
    well: bool = True

    def is_root(self) -> bool:
        return self.well

    def kernel(self) -> str:
        return self.release

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def run(self, argv: list[str], *, stdin: str = "") -> Ran:
        program = argv[2] if argv[0] == "unshare" else argv[0]
        if program in self.without:
            return Ran(127, self.without[program])
        if argv[0] == "qemu-system-x86_64":
            return Ran(0, self.qemu if argv[1] == "--version" else self.machines)
        return Ran(0, f"{program} 1.0\nmore")

    def open_error(self, path: str) -> str:
        return self.error

    def library_error(self, name: str) -> str:
        return self.error

    def free_bytes(self, path: Path) -> int:
        return self.free

    def userfaultfd_error(self) -> str:
        return self.error

    def pagemap_scan_error(self) -> str:
        return self.error

    def clock_is_synchronised(self) -> bool:
        return self.well


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A store with an image in it."""
    file = tmp_path / "file"
    file.write_bytes(b"x")
    artifacts = []
    for name in ("kernel", "initramfs", "rootfs"):
        (tmp_path / name).write_bytes(b"x")
        artifacts.append(Artifact(tmp_path / name, digest_file(tmp_path / name)))
    store = ImageStore(tmp_path / "images")
    with exclusive(store.path, on_wait=lambda: None):
        store.publish("minimal", Parts(*artifacts), disk_mb=64, inputs={})
    return store.path


def broken_machine() -> FakeMachine:
    programs = ("qemu-system-x86_64", "qemu-img", "ip", "nft", "mke2fs", "musl-gcc")
    return FakeMachine(
        files={},
        without={name: f"{name} is not installed" for name in programs},
        release="4.19.0",
        error="No such device",
        free=0,
        well=False,
    )


def subject(machine: Machine, images: Path, *, kvm: bool = True) -> Subject:
    return Subject(Path("/state"), images, lambda: (kvm, "exit reason 17"), machine)


def test_a_machine_with_everything(images: Path) -> None:
    """Where everything is there no check fails and the exit code is 0."""
    found = run_checks(subject(FakeMachine(), images))
    assert [check.name for check in found if check.ok is False] == []
    assert exit_code(found) == 0
    assert render(found, json=False).endswith("This machine can run sandboxes.")


def test_a_machine_with_nothing(tmp_path: Path) -> None:
    """Where nothing is there every check that can fail does, names the remedy, and the exit code is 1."""
    found = run_checks(subject(broken_machine(), tmp_path, kvm=False))
    assert [check.name for check in found if check.ok is True] == []
    assert [check.name for check in found if check.ok is None] == ["device mapper", "pagemap scan"]
    assert [check.name for check in found if check.ok is False and not check.remedy] == []
    assert [check.name for check in found if check.detail == ""] == []
    assert exit_code(found) == 1


def test_names_are_unique(images: Path) -> None:
    """A check is known by its name."""
    names = [check.name for check in run_checks(subject(FakeMachine(), images))]
    assert len(set(names)) == len(names) == len(CHECKS)


@pytest.mark.parametrize(
    ("check", "machine", "says"),
    [
        (checks.qemu, FakeMachine(qemu="QEMU emulator version 5.2.0"), "older than 7.0"),
        (checks.qemu, FakeMachine(machines="pc  Standard PC"), "no microvm"),
        (checks.kernel, FakeMachine(release="5.4.0-generic"), "older than 5.10"),
        (checks.nftables, FakeMachine(without={"nft": "Error: No such file\nadd rule"}), "Error: No such file"),
        (checks.namespaces, FakeMachine(without={"ip": ""}), "unshare --net failed"),
        (checks.cgroups, FakeMachine(files={"/sys/fs/cgroup/cgroup.controllers": "cpu io"}), "without memory, pids"),
        (checks.forwarding, FakeMachine(files={"/proc/sys/net/ipv4/ip_forward": "0"}), "off"),
        (checks.memory, FakeMachine(files={"/proc/meminfo": "nonsense"}), "0.0 GiB"),
    ],
)
def test_what_is_wrong(check: Callable[[Subject], Check], machine: Machine, says: str, tmp_path: Path) -> None:
    """Each kind of trouble is told apart, in words."""
    found = check(subject(machine, tmp_path))
    assert found.ok is False
    assert says in found.detail


def test_missing_controllers_are_named_in_the_command(tmp_path: Path) -> None:
    """The command switches on just what is missing."""
    machine = FakeMachine(files={"/sys/fs/cgroup/cgroup.controllers": "cpu io"})
    assert "'+memory +pids'" in checks.cgroups(subject(machine, tmp_path)).remedy


def test_no_kvm_is_no_obstacle(images: Path) -> None:
    """Without KVM sandboxes run emulated: a warning, not a failure."""
    found = run_checks(subject(FakeMachine(), images, kvm=False))
    assert exit_code(found) == 0
    text = render(found, json=False)
    assert "with the restrictions above" in text
    assert "exit reason 17" in text


REPORT = (
    Check("root", True, "running as root"),
    Check("tun", False, "No such device", "modprobe tun"),
    Check("device mapper", None, "not there"),
    Check("clock", False, "not kept", "timedatectl set-ntp true", essential=False),
)


def test_text() -> None:
    """One line a check, and under each that fails the command that mends it."""
    assert render(REPORT, json=False) == (
        "ok      root           running as root\n"
        "MISSING tun            No such device\n"
        "                       fix: modprobe tun\n"
        "info    device mapper  not there\n"
        "warn    clock          not kept\n"
        "                       fix: timedatectl set-ntp true\n"
        "\n"
        "This machine cannot run sandboxes yet: tun."
    )


def test_json() -> None:
    """The same for programs."""
    found = json.loads(render(REPORT, json=True))
    assert found["ok"] is False
    assert found["checks"][1] == {
        "name": "tun",
        "ok": False,
        "detail": "No such device",
        "remedy": "modprobe tun",
        "essential": True,
    }
    assert len(found["checks"]) == len(REPORT)


def test_nothing_asked() -> None:
    """An empty report renders too."""
    assert exit_code([]) == 0
    assert render([], json=False).strip() == "This machine can run sandboxes."


class TestMachine:
    """The real machine answers every question without failing, whatever this one has."""

    def test_answers(self, tmp_path: Path) -> None:
        machine = Machine()
        assert machine.kernel()
        assert machine.free_bytes(tmp_path / "not/there/yet") > 0
        assert isinstance(machine.is_root(), bool)
        assert isinstance(machine.clock_is_synchronised(), bool)
        for error in (machine.userfaultfd_error(), machine.pagemap_scan_error()):
            assert isinstance(error, str)

    def test_files(self, tmp_path: Path) -> None:
        machine = Machine()
        (tmp_path / "file").write_bytes(b"\xff text")
        assert "text" in (machine.read(str(tmp_path / "file")) or "")
        assert machine.read(str(tmp_path / "missing")) is None
        assert machine.open_error(str(tmp_path / "missing")) == "No such file or directory"
        assert machine.open_error("/dev/null") == ""
        assert "capsule-nothing" in machine.library_error("capsule-nothing.so.1")

    def test_programs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = Machine()
        assert machine.run(["cat"], stdin="said\n") == Ran(0, "said")
        assert machine.run(["sh", "-c", "echo no >&2; exit 4"]) == Ran(4, "no")
        assert machine.run(["capsule-nothing"]).code == 127
        monkeypatch.setattr("agent.doctor.machine.TRIAL_SECONDS", 0.05)
        assert machine.run(["sleep", "30"]).code == 124
