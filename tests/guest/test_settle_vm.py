"""A pause as the guest sees it, in real VMs: the real kernel's freezer, and two clones of one frozen guest."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.images.cpio import archive, regular
from agent.images.store import ImageStore
from agent.vmm.tsc import tsc_khz

pytestmark = pytest.mark.vm

IMAGES = Path(os.environ.get("CAPSULE_AGENT_IMAGES", "/var/lib/capsule/images"))
QEMU = "qemu-system-x86_64"
MEMORY = "192M"
CPU = "max,rdrand=off,rdseed=off"
"""Without the instructions that would give every clone its own random numbers, whatever we do."""
BOOT_SECONDS = 120
NETWORK = "user,id=net,net=169.254.0.20/30,host=169.254.0.22,dhcpstart=169.254.0.21,dns=169.254.0.23,restrict=on"
"""QEMU's own network: no root, no way out, and the daemon's only peer is the forwarded port."""


@dataclass
class Machine:
    """A QEMU process, its monitor, and the guest daemon's port on loopback."""

    process: subprocess.Popen
    monitor: socket.socket
    port: int
    console: Path

    def command(self, name: str, **arguments: Any) -> Any:
        """One monitor command and its answer; events in between are dropped."""
        self.monitor.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise AssertionError(answer["error"])
            if "return" in answer:
                return answer["return"]

    def __post_init__(self) -> None:
        self.monitor.settimeout(30)
        self.lines = self.monitor.makefile()
        self.lines.readline()
        self.command("qmp_capabilities")

    def stop(self) -> None:
        self.lines.close()
        self.monitor.close()
        self.process.kill()
        self.process.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Machines:
    """Starts VMs of one image and one daemon, each with a disk of its own."""

    def __init__(self, directory: Path, daemon: Path) -> None:
        self.directory = directory
        self.image = ImageStore(IMAGES).load("minimal")
        self.initramfs = directory / "initramfs"
        init = archive([regular("init", daemon.read_bytes(), mode=0o755)])  # unpacked last, over the image's
        self.initramfs.write_bytes(self.image.initramfs.read_bytes() + init)
        self.started: list[Machine] = []

    def disk(self, name: str) -> Path:
        path = self.directory / name
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(self.image.rootfs), str(path)]
        subprocess.run(command, check=True, timeout=30)
        return path

    def start(self, disk: Path, *more: str) -> Machine:
        port, name = free_port(), disk.stem
        monitor, theirs = socket.socketpair()
        append = f"console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on root=/dev/vda tsc_early_khz={tsc_khz()}"
        console = self.directory / f"{name}.console"
        command = [
            *(QEMU, "-M", "microvm", "-accel", "tcg,tb-size=32", "-cpu", CPU, "-m", MEMORY),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"),
            *("-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"),
            *("-serial", f"file:{console}", "-kernel", str(self.image.kernel), "-initrd", str(self.initramfs)),
            *("-append", f"{append} tsc=reliable no_timer_check"),
            *("-drive", f"id=disk,if=none,file={disk},format=qcow2", "-device", "virtio-blk-device,drive=disk"),
            *("-netdev", f"{NETWORK},hostfwd=tcp:127.0.0.1:{port}-169.254.0.21:5000"),
            *("-device", "virtio-net-device,netdev=net,mac=02:00:00:00:00:01", *more),
        ]
        log = (self.directory / f"{name}.log").open("wb")
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=log, stderr=log)
        log.close()
        theirs.close()
        machine = Machine(process, monitor, port, console)
        self.started.append(machine)
        return machine


@pytest.fixture(scope="module")
def machines(tmp_path_factory, daemon_binary):
    if shutil.which(QEMU) is None:
        pytest.skip("QEMU is not installed (apt-get install qemu-system-x86)")
    if not IMAGES.is_dir():
        pytest.skip(f"no images in {IMAGES}; build them with: python -m agent.images build")
    machines = Machines(tmp_path_factory.mktemp("machines"), daemon_binary)
    yield machines
    for machine in machines.started:
        machine.stop()


@pytest.fixture(scope="module")
def booted(machines):
    """A machine that has booted, for every test."""
    machine = machines.start(machines.disk("source.qcow2"))
    machine.command("cont")
    return machine


@pytest.fixture
def reach(make_client, until):
    """`reach(machine)`: a connection to its guest daemon."""

    def attempt(machine):
        assert machine.process.poll() is None, "QEMU ended"
        with suppress(OSError, EOFError):  # the forwarded port takes connections before the guest does
            return make_client(machine.port)
        return None

    return lambda machine: until(lambda: attempt(machine), machine.console.read_text(), BOOT_SECONDS)


@pytest.fixture
def client(booted, reach, until):
    connection = reach(booted)
    yield connection
    connection.call("thaw")
    for process in connection.call("processes.list").reply["processes"]:
        connection.call("processes.signal", {"process": process["pid"], "signal": 9})
    until(lambda: processes(connection) == 0, "all have ended", 60)


def shell(client, command, **body):
    outcome = client.call("exec", {"cmd": command, **body})
    assert outcome.reply is not None, outcome.message
    return outcome.stdout.decode()


def size(client, path):
    outcome = client.call("files.stat", {"path": path})
    return outcome.reply["entry"]["size"] if outcome.reply else 0


def processes(client):
    return client.call("files.read", {"path": "/sys/fs/cgroup/jobs/cgroup.procs"}).content.count(b"\n")


def test_what_the_guest_sees_of_its_group(client):
    """It is the root of all groups there, its controllers can be used, and nothing of ours is in it."""
    assert shell(client, "cat /proc/self/cgroup") == "0::/jobs\n"
    assert shell(client, "cat /sys/fs/cgroup/cgroup.procs") == ""
    assert shell(client, "cat /proc/1/cgroup") == "0::/..\n"
    assert {"cpu", "memory", "pids"} <= set(shell(client, "cat /sys/fs/cgroup/cgroup.controllers").split())
    assert shell(client, "grep -c cgroup2 /proc/mounts") == "1\n"


BUSY = "for number in $(seq 49); do (while :; do :; done) & done; wait"
SPAWNER = "while :; do (:) & (:) & (:) & wait; done"
COUNT = "while :; do echo >> /run/count; done"
ENGINE = "mkdir -p /sys/fs/cgroup/engine && echo $$ > /sys/fs/cgroup/engine/cgroup.procs && "


def test_fifty_processes_and_a_spawner_freeze_in_time(client, until):
    """One core that is 50 times taken: the bound holds, nothing runs, everything goes on. A group that a container
    engine made belongs to it."""
    client.call("exec", {"cmd": ENGINE + COUNT, "background": True, "tag": "count"})
    client.call("exec", {"cmd": SPAWNER, "background": True})
    client.call("exec", {"cmd": BUSY, "background": True})
    until(lambda: size(client, "/run/count"), "it counts", 60)
    until(lambda: processes(client) > 50, "all run", 60)
    began = time.monotonic()
    reply = client.call("settle", {"timeout_ms": 25_000}).reply
    took = time.monotonic() - began
    assert reply["frozen"] is True
    assert took < 29
    counted = size(client, "/run/count")
    end = time.monotonic() + 1
    while time.monotonic() < end:
        assert size(client, "/run/count") == counted
    client.call("thaw")
    until(lambda: size(client, "/run/count") > counted, "it goes on", 30)


def test_a_group_that_was_given_away(client):
    """Root hands the start group's controllers on, which makes it unfit for processes: there is another one."""
    hand_on = """mkdir -p /sys/fs/cgroup/rest
        for pid in $(cat /sys/fs/cgroup/jobs/cgroup.procs); do echo $pid > /sys/fs/cgroup/rest/cgroup.procs; done
        echo +memory > /sys/fs/cgroup/cgroup.subtree_control
        echo +memory > /sys/fs/cgroup/jobs/cgroup.subtree_control"""
    assert client.call("exec", {"cmd": hand_on}).reply["exit_code"] == 0
    assert shell(client, "cat /proc/self/cgroup") == "0::/jobs-1\n"
    assert client.call("settle").reply["frozen"] is True


RANDOM = "while :; do read id < /proc/sys/kernel/random/uuid; echo $id; done > /run/random"
UUID_LINE = 37
DRAW = """import os, uuid
print(uuid.uuid4(), os.getrandom(16).hex(), open("/dev/urandom", "rb").read(16).hex())"""


def migrate(machine, target, until):
    machine.command("stop")
    machine.command("migrate-set-parameters", **{"max-bandwidth": 1 << 33})
    machine.command("migrate", uri=f"exec:cat > {target}")
    until(lambda: machine.command("query-migrate")["status"] == "completed", "saved", 60)


@dataclass
class Frozen:
    """`drawn`: bytes of /run/random before; `pid`: who writes it; `boot_id`: as it was read in the source."""

    state: Path
    drawn: int
    pid: int
    boot_id: str


@pytest.fixture
def frozen(machines, booted, client, until, tmp_path):
    """A guest in which a background process draws numbers and a foreground one sleeps, saved."""
    shell(client, "python3", args=["-c", DRAW])  # waits for the kernel's generator: from here on it is a mere sequence
    boot_id = shell(client, "cat /proc/sys/kernel/random/boot_id")
    pid = client.call("exec", {"cmd": RANDOM, "background": True}).reply["pid"]
    client.notice(client.open("exec", {"cmd": "sleep 1000"}))
    until(lambda: size(client, "/run/random"), "it draws", 30)
    reply = client.call("settle", {"timeout_ms": 25_000}).reply  # the machine's disk may be busy
    assert (reply["frozen"], reply["synced"]) == (True, True)
    drawn = size(client, "/run/random")
    migrate(booted, tmp_path / "state", until)
    for name in "ab":
        shutil.copy(machines.directory / "source.qcow2", machines.directory / f"clone-{name}.qcow2")
    booted.command("cont")
    return Frozen(tmp_path / "state", drawn, pid, boot_id)


@pytest.fixture
def clone(machines, frozen, reach, until):
    """`clone(name)`: a connection to a clone that has been told who it is, and how long ago its time was looked up."""

    def start(name):
        machine = machines.start(machines.directory / f"clone-{name}.qcow2", "-incoming", f"exec:cat {frozen.state}")
        until(lambda: machine.command("query-status")["status"] != "inmigrate", "loaded", 60)
        machine.command("cont")
        connection = reach(machine)
        assert connection.call("info").reply["frozen"] is True
        body = {"hostname": f"clone-{name}", "machine_id": name * 32, "entropy": os.urandom(64)}
        now = time.time_ns()
        assert connection.call("configure", {**body, "time_ns": now}).reply == {}
        return connection, (time.time_ns() - now) / 1e9

    return start


def test_two_clones_have_nothing_random_in_common(clone, frozen, until):
    """From the first number after the thaw; and each has its own name, machine id and the right time. The boot id is
    the boot's, which they share."""
    found = []
    for name in "ab":
        link, late = clone(name)
        asked = time.time()
        assert asked - 0.5 - late < float(shell(link, "date +%s.%N")) < time.time() + 0.5
        identity = shell(link, "uname -n; cat /etc/hostname /etc/machine-id").split()
        assert identity == [f"clone-{name}", f"clone-{name}", name * 32]
        assert shell(link, "cat /proc/sys/kernel/random/boot_id") == frozen.boot_id
        assert [process["pid"] for process in link.call("processes.list").reply["processes"]] == [frozen.pid]
        until(lambda link=link: size(link, "/run/random") > frozen.drawn + 10 * UUID_LINE, "it goes on drawing", 30)
        text = link.call("files.read", {"path": "/run/random"}).content[frozen.drawn :].decode()
        numbers = text.split("\n")[1:-1]  # the first may have been drawn before the freeze
        numbers += shell(link, "python3", args=["-c", DRAW]).split()
        assert len(set(numbers)) == len(numbers) >= 12
        found.append(set(numbers))
    assert not found[0] & found[1]
