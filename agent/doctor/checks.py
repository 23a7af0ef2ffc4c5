"""The questions, in the order in which they are shown; each is a small function from `Subject` to `Check`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agent.doctor.machine import Machine
from agent.doctor.report import Check
from agent.images.errors import ImagesError
from agent.images.store import ImageStore

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
QEMU = "qemu-system-x86_64"
OLDEST_QEMU = (7, 0)
OLDEST_KERNEL = (5, 10)
IMAGE = "minimal"
CONTROLLERS = frozenset({"cpu", "memory", "pids"})
STATE_BYTES = 5 * GIB
SHM_BYTES = 1 * GIB
MEMORY_BYTES = 1 * GIB
# The same kinds of rules as a sandbox's network has, in a network namespace that ends with the trial.
NAT_TRIAL = (
    "add table ip trial; "
    "add chain ip trial out { type nat hook postrouting priority 100; }; "
    "add rule ip trial out masquerade; "
    "add rule ip trial out ct state established accept\n"
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at: the machine, where the agent keeps its state and its images, and the probe that boots a
    guest on KVM and answers (works, what it saw).
    """

    state: Path
    images: Path
    kvm_probe: Callable[[], tuple[bool, str]]
    machine: Machine = field(default_factory=Machine)


def run_checks(subject: Subject) -> list[Check]:
    """Ask every question. Blocks for up to a few seconds: call from a thread in Trio."""
    return [check(subject) for check in CHECKS]


def root(subject: Subject) -> Check:
    """Namespaces, taps and rules need all rights."""
    if subject.machine.is_root():
        return Check("root", True, "running as root")
    return Check("root", False, "not running as root", "sudo capsule-agent doctor")


def kernel(subject: Subject) -> Check:
    """The host's kernel is new enough."""
    release = subject.machine.kernel()
    if _version(release) >= OLDEST_KERNEL:
        return Check("kernel", True, f"Linux {release}")
    oldest = ".".join(map(str, OLDEST_KERNEL))
    return Check("kernel", False, f"Linux {release} is older than {oldest}", "apt-get install linux-image-amd64")


def qemu(subject: Subject) -> Check:
    """QEMU is there, new enough, and knows the `microvm` machine."""
    fix = "apt-get install --no-install-recommends qemu-system-x86"
    ran = subject.machine.run([QEMU, "--version"])
    if ran.code != 0:
        return Check("qemu", False, ran.said, fix)
    version = ran.said.partition("version ")[2].split(" ")[0].split("\n")[0]
    if _version(version) < OLDEST_QEMU:
        return Check("qemu", False, f"QEMU {version} is older than 7.0", fix)
    if "microvm" not in subject.machine.run([QEMU, "-machine", "help"]).said:
        return Check("qemu", False, f"QEMU {version} has no microvm machine", fix)
    return Check("qemu", True, f"QEMU {version} with microvm")


def qemu_img(subject: Subject) -> Check:
    """Overlays are made with qemu-img."""
    return _program(subject, "qemu-img", "--version", package="qemu-utils")


def kvm(subject: Subject) -> Check:
    """A guest really runs on KVM; a /dev/kvm that opens proves nothing."""
    works, saw = subject.kvm_probe()
    if works:
        return Check("kvm", True, f"a probe guest ran ({saw})", essential=False)
    fix = "modprobe kvm_intel || modprobe kvm_amd, with virtualization (nested, in a VM) switched on below this system"
    return Check("kvm", False, f"sandboxes run emulated, many times slower ({saw})", fix, essential=False)


def tun(subject: Subject) -> Check:
    """Taps can be made."""
    error = subject.machine.open_error("/dev/net/tun")
    fix = "modprobe tun; mkdir -p /dev/net && mknod /dev/net/tun c 10 200"
    return Check("tun", not error, error or "/dev/net/tun opens", fix if error else "")


def iproute2(subject: Subject) -> Check:
    """The trials below use it."""
    return _program(subject, "ip", "-V", package="iproute2")


def namespaces(subject: Subject) -> Check:
    """A network namespace with a veth pair can be made."""
    argv = ["unshare", "--net", "ip", "link", "add", "trial0", "type", "veth", "peer", "name", "trial1"]
    ran = subject.machine.run(argv)
    if ran.code == 0:
        return Check("namespaces", True, "network namespaces with veth pairs")
    fix = "modprobe veth; sysctl -w user.max_net_namespaces=65536"
    return Check("namespaces", False, ran.said or "unshare --net failed", fix)


def nftables(subject: Subject) -> Check:
    """The library is there, and the kernel takes rules that translate addresses."""
    error = subject.machine.library_error("libnftables.so.1")
    if error:
        return Check("nftables", False, error, "apt-get install --no-install-recommends nftables")
    ran = subject.machine.run(["unshare", "--net", "nft", "-f", "-"], stdin=NAT_TRIAL)
    if ran.code == 0:
        return Check("nftables", True, "the library loads, the kernel translates addresses")
    fix = "apt-get install nftables; modprobe -a nf_tables nft_chain_nat nft_masq nft_ct"
    return Check("nftables", False, ran.said.split("\n")[0] or "nft failed", fix)


def forwarding(subject: Subject) -> Check:
    """Packets of guests are forwarded."""
    if (subject.machine.read("/proc/sys/net/ipv4/ip_forward") or "").strip() == "1":
        return Check("ip forward", True, "IPv4 forwarding is on", essential=False)
    fix = "sysctl -w net.ipv4.ip_forward=1"
    return Check("ip forward", False, "IPv4 forwarding is off: no network for sandboxes", fix, essential=False)


def cgroups(subject: Subject) -> Check:
    """Limits for each VM."""
    text = subject.machine.read("/sys/fs/cgroup/cgroup.controllers")
    if text is None:
        fix = "boot with systemd.unified_cgroup_hierarchy=1, or: mount -t cgroup2 none /sys/fs/cgroup"
        return Check("cgroups", False, "cgroup v2 is not mounted", fix, essential=False)
    missing = CONTROLLERS - set(text.split())
    if missing:
        fix = f"echo '{' '.join(f'+{name}' for name in sorted(missing))}' > /sys/fs/cgroup/cgroup.subtree_control"
        return Check("cgroups", False, f"without {', '.join(sorted(missing))}", fix, essential=False)
    return Check("cgroups", True, f"v2 with {' '.join(sorted(CONTROLLERS))}", essential=False)


def device_mapper(subject: Subject) -> Check:
    """The faster overlay driver; qcow2 works everywhere."""
    there = "device-mapper" in (subject.machine.read("/proc/misc") or "")
    return Check("device mapper", None, "there" if there else "not there: overlays are qcow2 files")


def userfaultfd(subject: Subject) -> Check:
    """Guest memory can come by page fault: what every resume needs."""
    error = subject.machine.userfaultfd_error()
    if not error:
        return Check("userfaultfd", True, "page faults can be handled in user space", essential=False)
    fix = "use a kernel from 6.1 on with CONFIG_USERFAULTFD, and in a container pass /dev/userfaultfd through"
    return Check("userfaultfd", False, f"sandboxes boot, but cannot be resumed ({error})", fix, essential=False)


def pagemap_scan(subject: Subject) -> Check:
    """Whether the kernel lists written pages (6.7 and later)."""
    error = subject.machine.pagemap_scan_error()
    return Check("pagemap scan", None, f"not there: snapshots compare content ({error})" if error else "there")


def shared_memory(subject: Subject) -> Check:
    """Guest memory lives in /dev/shm."""
    free = subject.machine.free_bytes(Path("/dev/shm"))  # noqa: S108 - only looked at
    if free >= SHM_BYTES:
        return Check("shared memory", True, f"{_gib(free)} free in /dev/shm")
    fix = "mount -o remount,size=75% /dev/shm"
    return Check("shared memory", False, f"{_gib(free)} free in /dev/shm, the memory of guests", fix)


def memory(subject: Subject) -> Check:
    """Enough memory for a few guests."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", subject.machine.read("/proc/meminfo") or "", re.MULTILINE)
    free = int(found[1]) * 1024 if found else 0
    if free >= MEMORY_BYTES:
        return Check("memory", True, f"{_gib(free)} available", essential=False)
    fix = "stop other programs, or give this machine more memory"
    return Check("memory", False, f"{_gib(free)} available", fix, essential=False)


def state_space(subject: Subject) -> Check:
    """Enough disk for overlays."""
    free = subject.machine.free_bytes(subject.state)
    if free >= STATE_BYTES:
        return Check("disk", True, f"{_gib(free)} free for {subject.state}", essential=False)
    fix = f"free space on the disk of {subject.state}, or set CAPSULE_AGENT_STATE to another one"
    return Check("disk", False, f"{_gib(free)} free for {subject.state}", fix, essential=False)


def images(subject: Subject) -> Check:
    """The image that sandboxes start from is there and whole."""
    try:
        image = ImageStore(subject.images).load(IMAGE)
    except ImagesError as err:
        return Check("images", False, str(err), "scripts/setup")
    return Check("images", True, f"{image.name} of {image.created_at:%Y-%m-%d} ({image.digest[:12]})")


def e2fsprogs(subject: Subject) -> Check:
    """Making images needs mke2fs; running them does not."""
    return _program(subject, "mke2fs", "-V", package="e2fsprogs", essential=False)


def musl(subject: Subject) -> Check:
    """Building the guest daemon needs musl-gcc; running it does not."""
    return _program(subject, "musl-gcc", "--version", package="musl-tools", essential=False)


def clock(subject: Subject) -> Check:
    """Certificates and tokens are judged by this clock."""
    if subject.machine.clock_is_synchronised():
        return Check("clock", True, "kept by a time service", essential=False)
    fix = "apt-get install systemd-timesyncd && timedatectl set-ntp true"
    return Check("clock", False, "no time service keeps it: certificates may be refused", fix, essential=False)


CHECKS: tuple[Callable[[Subject], Check], ...] = (
    root,
    kernel,
    qemu,
    qemu_img,
    kvm,
    tun,
    iproute2,
    namespaces,
    nftables,
    forwarding,
    cgroups,
    device_mapper,
    userfaultfd,
    pagemap_scan,
    shared_memory,
    memory,
    state_space,
    images,
    e2fsprogs,
    musl,
    clock,
)


def _program(subject: Subject, name: str, *arguments: str, package: str, essential: bool = True) -> Check:
    ran = subject.machine.run([name, *arguments])
    first = ran.said.split("\n")[0]
    if ran.code == 0:
        return Check(name, True, first, essential=essential)
    fix = f"apt-get install --no-install-recommends {package}"
    return Check(name, False, first or f"{name} failed", fix, essential)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
