"""Pause, resume, create, checkpoint and fork on real VMs, each beside a baseline taken in the same run.

Run by `scripts/bench snapshots`, as root on a host of its own. Goals are printed beside the ratios they are for; a
goal that is missed is no failure: seconds on a busy machine say little, and a person has to look.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import trio
from resumes import MEMORY_MB, fill, resumes
from stage import (
    LIGHT,
    TMPFS,
    Subject,
    host_links,
    platform,
    populated,
    post,
    show,
    show_median,
    show_steps,
    user,
    wait_golden,
    written_and_synced,
)

CREATES = 5
PAUSES = 5
DIRTY_MB = (8, 64, 200)
CHECKPOINT_MB = (6, 64)
TEMPLATE_MB = 64
PARTS = ("create", "resume", "pause", "checkpoint", "fork")


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


async def main() -> None:
    """All parts, or those that were asked for, in this order."""
    wanted = set(sys.argv[1:]) or set(PARTS)
    cold = await cold_creates() if wanted & {"create", "fork"} else []
    with platform() as (data, ready):
        api = user(ready)
        await trio.to_thread.run_sync(wait_golden, data)
        try:
            async with host_links(data) as links:
                if "create" in wanted:
                    async with populated(api, links, *fill(TEMPLATE_MB), memory_mb=MEMORY_MB) as subject:
                        await snapshot_creates(api, links, subject, cold)
                if "resume" in wanted:
                    await resumes(data, api, links)
                async with populated(api, links, TMPFS, memory_mb=MEMORY_MB) as subject:
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
