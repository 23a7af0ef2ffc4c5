"""Resumes: from the request to the first answer of a command, beside QEMU's own way and beside our own without its
batching; a module of snapshots.py.

Each round takes every way once, so that a noisy moment hits all of them. Three settings: a short command and one that
reads much of the guest's memory, in a guest that has filled a fifth of it; and the short one in a full guest. What
neither way avoids is the start of a VMM and what the guest itself executes, which is slow where it is emulated: beside
the whole, the time until the vCPUs run is compared, too.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import httpx
import trio
from full_restore import FullRestore
from stage import LIGHT, TMPFS, Subject, populated, show, show_median, show_steps

from agent.pager.client import PagerClient
from agent.pager.process import kill, open_process, wait_ended
from agent.pager.process_file import read_process_file
from capsule.hosts.links import HostLinks

ROUNDS = 7
WARM_ROUNDS = 3
MEMORY_MB = 512
CHUNK_PAGES = 16
BLOB_MB = 32
HEAVY = ("/bin/sh", "-c", "exec cat /mnt/t/blob > /dev/null")
SETTINGS = ((64, {"true": LIGHT, f"cat of {BLOB_MB} MiB": HEAVY}), (352, {"true in a full guest": LIGHT}))
"""MiB beside the blob, and the commands."""
RECORDING_SECONDS = 30
IMPORT_SECONDS = 1.5
QUIET_SECONDS = 0.3
AFTER_START = {"guest", "commit", "http_resume", "http_exec"}
"""Steps of a resume while the vCPUs run already, and those that the others are a part of."""


def fill(mib: int) -> tuple[str, ...]:
    """Commands that put random content into so much of a guest's memory, and the blob."""
    return (
        TMPFS,
        *(
            f"dd if=/dev/urandom of=/mnt/t/{name} bs=1M count={size} status=none"
            for name, size in (("blob", BLOB_MB), ("fill", mib))
        ),
    )


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
        await trio.sleep(IMPORT_SECONDS)
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
        await trio.sleep(QUIET_SECONDS)
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

    async def pause(self) -> None:
        """Harmless when it rests already."""
        await self._subject.pause()

    async def _recorded(self) -> None:
        """Wait until the host has written down what the resume has touched."""
        with trio.move_on_after(RECORDING_SECONDS):
            while not self._working_sets():
                await trio.sleep(0.02)
        await trio.sleep(QUIET_SECONDS)

    def _working_sets(self) -> list[Path]:
        """Of the sandbox's own snapshots."""
        own = (path.parent for path in self._snapshots.glob("*/manifest.json") if self._subject.id in path.read_text())
        return [path for directory in own if (path := directory / "working-set").exists()]


async def resumes(data: Path, api: httpx.Client, links: HostLinks) -> None:
    """All settings."""
    pagers = Pagers(data / "agent" / "pager")
    try:
        async with trio.open_nursery() as nursery:
            pager = PagerClient(pagers.directory)
            await nursery.start(pager.run)
            for mib, commands in SETTINGS:
                async with (
                    populated(api, links, *fill(mib), memory_mb=MEMORY_MB) as subject,
                    FullRestore.of(data / f"full{mib}", MEMORY_MB, *fill(mib)) as full,
                ):
                    for label, command in commands.items():
                        bench = ResumeBench(data, subject, pager)
                        baseline = await all_ways(bench, pagers, full, command)
                        show_resumes(label, bench, baseline, full)
            nursery.cancel_scope.cancel()
    finally:
        pagers.reap()


async def all_ways(bench: ResumeBench, pagers: Pagers, full: FullRestore, command: tuple[str, ...]) -> list[float]:
    """Every round; the seconds of QEMU's way."""
    for _ in range(WARM_ROUNDS):
        await bench.round("", command, working_set=True)
    baseline = []
    for _ in range(ROUNDS):
        baseline.append(await full.restore(*command))
        await bench.round("", command, working_set=True)
        await bench.round("ours", command, working_set=True)
        await bench.round("no set", command, working_set=False)
        await bench.pause()
        await pagers.use(1)
        await bench.round("pages", command, working_set=False)
        await bench.pause()
        await pagers.use(CHUNK_PAGES)
    return baseline


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
    running = [sum(ms for name, ms in one.items() if name not in AFTER_START) / 1000 for one in bench.steps]
    theirs = [(one["start"] + one["load"]) / 1000 for one in full.steps[-ROUNDS:]]
    show_median("  QEMU's, until the vCPUs run", theirs)
    show_median("  ours, until the vCPUs run", running, theirs, "QEMU's")
    counts = {name: statistics.median(values) for name, values in bench.faults.items()}
    show("  faults, a page at a time", counts["pages"], "")
    show("  faults, 64 KiB, no working set", counts["no set"], "", counts["pages"], "a page at a time")
    show("  faults, working set recorded", counts["ours"], "", counts["pages"], "a page at a time", goal=0.05)
    show("  faults, working set recorded", counts["ours"], "", counts["no set"], "64 KiB, no set")
    show("  working set", statistics.median(bench.prefetched) / 2**20, "MiB")
