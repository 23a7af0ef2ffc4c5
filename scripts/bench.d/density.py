"""How many sandboxes a machine carries: 50 paused beside 20 running, what each of them costs, and how long that takes.

Run by `scripts/bench density`, as root on a host of its own. Memory is the fall of MemAvailable: it counts page tables,
translated code and the parts of a guest that no process has mapped, which a process's PSS does not.
"""

from __future__ import annotations

import os
import statistics
import time
from contextlib import suppress
from pathlib import Path

import trio
from stage import Subject, host_links, platform, show, show_median, user, wait_golden

from agent.pager.process_file import read_process_file

PAUSED = 50
RUNNING = 20
MEMORY_MB = 256
AT_ONCE = 4
IDLE_SECONDS = 30
SETTLE_SECONDS = 5
TICK = os.sysconf("SC_CLK_TCK")


def available_mb() -> float:
    """Of the host's memory."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise LookupError("MemAvailable")


def disk_mb(root: Path) -> float:
    """Allocated by what lies below; a file with several names counts once."""
    blocks = {}
    for directory, _, files in os.walk(root):
        for name in files:
            with suppress(OSError):
                status = os.lstat(Path(directory, name))
                blocks[status.st_ino] = status.st_blocks
    return sum(blocks.values()) * 512 / 2**20


def processes_of(data: Path, ready: dict) -> dict[int, str]:
    """pid → what it is, of everything this platform runs."""
    found = dict.fromkeys(ready["agent_pids"], "agent") | dict.fromkeys(ready["control_pids"], "control plane")
    if (pager := read_process_file(data / "agent" / "pager")) is not None:
        found[pager.pid] = "pager"
    for path in Path("/proc").iterdir():
        with suppress(OSError):
            if path.name.isdigit() and str((path / "cwd").readlink()).startswith(str(data)):
                program = (path / "cmdline").read_bytes()
                found[int(path.name)] = "vm" if b"qemu-system" in program else "database"
    return found


def pss_mb(pid: int) -> float:
    """Proportional set size."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def guest_mb(pid: int) -> float:
    """Allocated of the guest's memory file, whether mapped or not."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if "memfd:" in str(path.readlink()) and (status := path.stat()).st_size == MEMORY_MB << 20:
                return status.st_blocks * 512 / 2**20
    return 0.0


def cpu_seconds(pid: int) -> float:
    """User and system time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


async def many(count: int, make) -> tuple[list[Subject], list[float], float]:
    """`make` so often, AT_ONCE at a time; subjects, seconds of each, seconds of all."""
    subjects: list[Subject] = []
    seconds: list[float] = []
    limit = trio.CapacityLimiter(AT_ONCE)

    async def one() -> None:
        async with limit:
            began = time.perf_counter()
            subjects.append(await make())
            seconds.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return subjects, seconds, time.perf_counter() - began


async def bring_up(data: Path, api, links) -> list[Subject]:
    """The paused ones, then the running ones; what each kind costs."""

    async def rest() -> Subject:
        subject = await Subject.create(api, links, memory_mb=MEMORY_MB)
        await subject.exec("/bin/sh", "-c", "echo $$ > /root/mark")
        await subject.pause()
        return subject

    async def run() -> Subject:
        subject = await Subject.create(api, links, memory_mb=MEMORY_MB)
        await subject.exec("/bin/true")
        return subject

    memory, disk = available_mb(), disk_mb(data / "agent")
    paused, seconds, total = await many(PAUSED, rest)
    await trio.sleep(SETTLE_SECONDS)
    show(f"{PAUSED} x create, exec and pause, {AT_ONCE} at a time", total, "s")
    show_median("  each", seconds)
    show("  host memory per paused sandbox", (memory - available_mb()) / PAUSED, "MiB")
    show("  disk per paused sandbox", (disk_mb(data / "agent") - disk) / PAUSED, "MiB")
    memory = available_mb()
    _, seconds, total = await many(RUNNING, run)
    await trio.sleep(SETTLE_SECONDS)
    show(f"{RUNNING} x create and exec, {AT_ONCE} at a time", total, "s")
    show_median("  each", seconds)
    show("  host memory per running sandbox", (memory - available_mb()) / RUNNING, "MiB")
    show("  host memory of all of them", memory - available_mb(), "MiB")
    return paused


async def idle(data: Path, ready: dict) -> None:
    """What they cost while nobody asks for anything."""
    found = processes_of(data, ready)
    vms = [pid for pid, kind in found.items() if kind == "vm"]
    show("  VMs", len(vms), "")
    show("  PSS per VM", statistics.median(map(pss_mb, vms)), "MiB")
    show("  of the guest's memory, allocated", statistics.median(map(guest_mb, vms)), "MiB", MEMORY_MB, "its size")
    before = {pid: cpu_seconds(pid) for pid in found}
    await trio.sleep(IDLE_SECONDS)
    used = {pid: cpu_seconds(pid) - seconds for pid, seconds in before.items()}
    show("  idle CPU per VM", statistics.mean(used[pid] for pid in vms) / IDLE_SECONDS * 100, "%")
    for kind in sorted(set(found.values()) - {"vm"}):
        own = [pid for pid in found if found[pid] == kind]
        show(f"  idle CPU of the {kind}", sum(used[pid] for pid in own) / IDLE_SECONDS * 100, "%")
        show(f"  PSS of the {kind}", sum(map(pss_mb, own)), "MiB")


async def wake(paused: list[Subject]) -> None:
    """A few of the paused ones, on a host that is that full."""
    seconds = [await subject.resume() + await subject.exec("/bin/true") for subject in paused[:5]]
    show_median("resume to first exec reply beside all of them", seconds)


async def main() -> None:
    """All of it, in order."""
    with platform(CAPSULE_AGENT_GOLDEN_SHAPES=f"1x{MEMORY_MB}", CAPSULE_VCPU_OVERCOMMIT="64") as (data, ready):
        await trio.to_thread.run_sync(wait_golden, data)
        async with host_links(data) as links:
            paused = await bring_up(data, user(ready), links)
            await idle(data, ready)
            await wake(paused)
        began = time.perf_counter()
    show("platform stop, all of that removed", time.perf_counter() - began, "s")


if __name__ == "__main__":
    trio.run(main)
