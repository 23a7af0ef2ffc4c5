"""Pause, resume, create, checkpoint and fork on real VMs, each beside a baseline taken in the same run.

Run by `scripts/bench snapshots`, as root on a host of its own. Goals are printed beside the ratios they are for; a
goal that is missed is no failure: seconds on a busy machine say little, and a person has to look.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from uuid import uuid4

import trio
from full_restore import FullRestore
from stage import (
    Subject,
    host_links,
    platform,
    post,
    show,
    show_median,
    show_steps,
    user,
    wait_golden,
    written_and_synced,
)

from agent.pager.client import PagerClient
from agent.pager.process import kill, open_process, wait_ended
from agent.pager.process_file import read_process_file

ROUNDS = 7
WARM_ROUNDS = 3
CREATES = 5
MEMORY_MB = 512
CHUNK_PAGES = 16
BLOB_MB, FILL_MB = 32, 64
TMPFS = "mkdir -p /mnt/t && mount -t tmpfs -o size=90% t /mnt/t"
POPULATE = (
    TMPFS,
    f"dd if=/dev/urandom of=/mnt/t/blob bs=1M count={BLOB_MB} status=none",
    f"dd if=/dev/urandom of=/mnt/t/fill bs=1M count={FILL_MB} status=none",
)
LIGHT = ("/bin/true",)
HEAVY = ("/bin/sh", "-c", "exec cat /mnt/t/blob > /dev/null")
DIRTY_MB = (8, 64, 200)
CHECKPOINT_MB = (6, 64)
PAUSES = 3
RECORDING_SECONDS = 30


class Pagers:
    """The pager that serves a platform: ours as shipped, or one that brings a page at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._own: list[subprocess.Popen] = []

    async def use(self, pages: int) -> None:
        """Have one with this chunk serve from now on. The next is ready before the last one goes, so that the agent's
        supervisor finds it instead of starting its own. No VM may run."""
        ready, told = os.pipe()
        script = Path(__file__).with_name("page_by_page.py")
        with (self.directory / "bench.log").open("ab") as log:
            command = [sys.executable, script, self.directory, str(told), str(pages)]
            self._own.append(subprocess.Popen(command, pass_fds=[told], stdout=log, stderr=log, start_new_session=True))
        os.close(told)
        await trio.sleep(1.5)  # its imports
        await end_pager(self.directory)
        await trio.lowlevel.wait_readable(ready)
        os.close(ready)

    def reap(self) -> None:
        """The platform has ended them."""
        for process in self._own:
            process.kill()
            process.wait()


async def end_pager(directory: Path) -> None:
    """The one that serves now."""
    file = read_process_file(directory)
    pidfd = None if file is None else open_process(file.identity)
    if pidfd is not None:
        kill(pidfd, signal.SIGTERM)
        await wait_ended(pidfd)
        os.close(pidfd)


class ResumeBench:
    """Resumes of one sandbox, measured from the request to the answer of a command."""

    def __init__(self, data: Path, subject: Subject, pager: PagerClient) -> None:
        self._snapshots = data / "agent" / "snapshots" / "snapshots"
        self._subject = subject
        self._pager = pager
        self.seconds: dict[str, list[float]] = {}
        self.faults: dict[str, list[int]] = {}
        self.prefetched: list[int] = []
        self.steps: list[dict[str, float]] = []

    async def round(self, name: str, command: tuple[str, ...], *, working_set: bool) -> None:
        """Pause, resume, command; kept under `name`."""
        subject = self._subject
        await subject.pause()
        await trio.sleep(0.3)  # whatever else it leaves to do
        if not working_set:
            for path in self._working_sets():
                path.unlink()
        resume, answer = await subject.resume(), await subject.exec(*command)
        taken = resume + answer
        figures = (await self._pager.statistics())[subject.id]
        steps = await subject.steps("resume")
        steps |= {"http_resume": resume * 1000, "http_exec": answer * 1000}
        await self._recorded()
        if name:
            self.seconds.setdefault(name, []).append(taken)
            self.faults.setdefault(name, []).append(figures.faults)
        if name == "ours":
            self.prefetched.append(figures.prefetched_bytes)
            self.steps.append(steps)

    async def _recorded(self) -> None:
        """Wait until the host has written down what the resume has touched."""
        with trio.move_on_after(RECORDING_SECONDS):
            while not self._working_sets():
                await trio.sleep(0.02)
        await trio.sleep(0.3)

    def _working_sets(self) -> list[Path]:
        """Of the sandbox's own snapshots."""
        own = (path.parent for path in self._snapshots.glob("*/manifest.json") if self._subject.id in path.read_text())
        return [path for directory in own if (path := directory / "working-set").exists()]


async def resumes(data: Path, subject: Subject, full: FullRestore) -> None:
    """Both commands, each way in turn in every round."""
    pagers = Pagers(data / "agent" / "pager")
    try:
        async with trio.open_nursery() as nursery:
            pager = PagerClient(pagers.directory)
            await nursery.start(pager.run)
            for label, command in (("true", LIGHT), (f"cat of {BLOB_MB} MiB", HEAVY)):
                bench = ResumeBench(data, subject, pager)
                for _ in range(WARM_ROUNDS):
                    await bench.round("", command, working_set=True)
                baseline = []
                for _ in range(ROUNDS):
                    baseline.append(await full.restore(*command))
                    await bench.round("", command, working_set=True)
                    await bench.round("ours", command, working_set=True)
                    await bench.round("no set", command, working_set=False)
                    await subject.pause()
                    await pagers.use(1)
                    await bench.round("pages", command, working_set=False)
                    await subject.pause()
                    await pagers.use(CHUNK_PAGES)
                show_resumes(label, bench, baseline, full)
            nursery.cancel_scope.cancel()
    finally:
        pagers.reap()


def show_resumes(label: str, bench: ResumeBench, baseline: list[float], full: FullRestore) -> None:
    """All that was measured with one command."""
    ours, pages = bench.seconds["ours"], bench.seconds["pages"]
    print(f"resume to first exec reply, {label} (QEMU's stream: {full.stream_bytes() >> 20} MiB)")
    show_median("  QEMU's full restore", baseline)
    show_steps(full.steps[-ROUNDS:])
    show_median("  ours, a page at a time, no working set", pages, baseline, "QEMU's")
    show_median("  ours, 64 KiB, no working set", bench.seconds["no set"], pages, "a page at a time")
    show_median("  ours", ours, baseline, "QEMU's", goal=0.2)
    show_median("  ours", ours, pages, "a page at a time", goal=0.5)
    show_steps(bench.steps)
    counts = {name: statistics.median(values) for name, values in bench.faults.items()}
    show("  faults, a page at a time", counts["pages"], "")
    show("  faults, 64 KiB, no working set", counts["no set"], "", counts["pages"], "a page at a time")
    show("  faults, working set recorded", counts["ours"], "", counts["pages"], "a page at a time", goal=0.05)
    show("  faults, working set recorded", counts["ours"], "", counts["no set"], "64 KiB, no set")
    show("  working set", statistics.median(bench.prefetched) / 2**20, "MiB")


async def dirty(subject: Subject, mib: int) -> None:
    """New random content in so much of the guest's memory."""
    await subject.exec(
        "/bin/sh", "-c", f"dd if=/dev/urandom of=/mnt/t/dirty bs=1M count={mib} conv=notrunc status=none"
    )


async def pauses(data: Path, subject: Subject) -> None:
    """Of a guest that has dirtied d MiB, beside a plain write and fsync of d MiB."""
    for mib in DIRTY_MB:
        taken, stopped, plain, steps = [], [], [], []
        for _ in range(PAUSES):
            await dirty(subject, mib)
            plain.append(written_and_synced(data, mib))
            taken.append(await subject.pause())
            steps.append(await subject.steps("pause"))
            stopped.append(steps[-1].pop("stopped_ms") / 1000)
            await subject.resume()
        print(f"pause after {mib} MiB were dirtied")
        base = show_median("  plain write and fsync", plain)
        total = show_median("  pause", taken, plain, "plain")
        show("  pause beside 1.5 x plain + 100 ms", total * 1000, "ms", (1.5 * base + 0.1) * 1000, "that", goal=1)
        show_median("  vCPUs stand until the VM is gone", stopped)
        show_steps(steps)


async def checkpoints(data: Path, subject: Subject) -> None:
    """How long the vCPUs stand, beside a plain write into the page cache."""
    for mib in CHECKPOINT_MB:
        taken, stopped, plain, steps = [], [], [], []
        for _ in range(PAUSES):
            await dirty(subject, mib)
            plain.append(written_and_synced(data, mib, sync=False))
            body = {"snapshot_id": str(uuid4()), "sandbox_id": subject.id}
            began = time.perf_counter()
            made = await subject.links.call(subject.host, "snapshot.create", body, timeout=300)
            taken.append(time.perf_counter() - began)
            stopped.append(made["stopped_ms"] / 1000)
            steps.append(await subject.steps("resume"))
            del body["sandbox_id"]
            await subject.links.call(subject.host, "snapshot.remove", body, timeout=60)
        print(f"live checkpoint after {mib} MiB were dirtied")
        show_median("  plain write, not synced", plain)
        show_median("  vCPUs stand", stopped, plain, "plain")
        show_median("  until the snapshot is on disk", taken)
        show_steps(steps)


async def forks(subject: Subject, cold: list[float]) -> None:
    """From the request until all children run."""
    for count in (1, 5):
        taken = []
        for _ in range(PAUSES):
            began = time.perf_counter()
            items = (await post(subject.api, f"{subject.path}/fork", count=count))["items"]
            taken.append(time.perf_counter() - began)
            for child in items:
                if child.get("status") != "running":
                    sys.exit(f"a fork failed: {child}")
                await Subject(subject.api, subject.links, child).destroy()
        show_median(f"fork of {count} to all running", taken, cold, "one cold create")


async def creates(api, links, **fields: object) -> tuple[list[float], list[dict[str, float]]]:
    """Create to the first exec's reply, and the host's own account of it."""
    taken, steps = [], []
    for _ in range(CREATES):
        began = time.perf_counter()
        subject = await Subject.create(api, links, **fields)
        await subject.exec(*LIGHT)
        taken.append(time.perf_counter() - began)
        steps.append(await subject.steps("resume"))
        await subject.destroy()
    return taken, steps


async def cold_creates() -> list[float]:
    """On a platform without golden snapshots."""
    with platform(CAPSULE_AGENT_GOLDEN="false") as (data, ready):
        async with host_links(data) as links:
            taken, steps = await creates(user(ready), links)
    show_median("cold create to first exec reply", taken)
    show_steps(steps)
    return taken


async def snapshot_creates(api, links, subject: Subject, cold: list[float]) -> None:
    """From a golden snapshot, and from a template of a populated sandbox."""
    taken, steps = await creates(api, links)
    show_median("create of `minimal` to first exec reply", taken, cold, "cold", goal=0.1)
    show_steps(steps)
    await post(api, "/snapshots", sandbox_id=subject.sandbox["id"], name="bench")
    taken, steps = await creates(api, links, template="bench")
    show_median("create from a template to first exec reply", taken, cold, "cold", goal=0.1)
    show_steps(steps)


@asynccontextmanager
async def populated(api, links, *commands: str):
    """A sandbox after these commands."""
    subject = await Subject.create(api, links, memory_mb=MEMORY_MB)
    for command in commands:
        await subject.exec("/bin/sh", "-c", command)
    yield subject
    await subject.destroy()


async def main() -> None:
    """All of it, in order."""
    wanted = set(sys.argv[1:]) or {"create", "resume", "pause", "checkpoint", "fork"}
    cold = await cold_creates() if wanted & {"create", "fork"} else []
    with platform() as (data, ready):
        api = user(ready)
        await trio.to_thread.run_sync(wait_golden, data)
        try:
            async with host_links(data) as links:
                async with populated(api, links, *POPULATE) as subject:
                    if "create" in wanted:
                        await snapshot_creates(api, links, subject, cold)
                    if "resume" in wanted:
                        async with FullRestore.of(data / "full", MEMORY_MB, *POPULATE) as full:
                            await resumes(data, subject, full)
                async with populated(api, links, TMPFS) as subject:
                    if "pause" in wanted:
                        await pauses(data, subject)
                    if "checkpoint" in wanted:
                        await checkpoints(data, subject)
                    if "fork" in wanted:
                        await forks(subject, cold)
        except BaseException:
            with suppress(OSError):
                print((data / "log").read_text()[-6000:], file=sys.stderr)
            raise


if __name__ == "__main__":
    trio.run(main)
