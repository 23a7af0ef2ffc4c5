"""`capsule sandbox`: their lives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import trio

from capsule.cli.failures import OWN_FAILURE, Failure, say
from capsule.cli.finding import SandboxId, find
from capsule.cli.output import ago, as_document, fields, json_option, show, table, write
from capsule.cli.pairs import Pair, as_mapping
from capsule.cli.running import Command, run
from capsule.client import ApiError, CapsuleError, ForkFailure, SandboxInfo, TrioClient, TrioSandbox

AT_ONCE = 8
STATUSES = (
    *("pending", "starting", "running", "pausing", "paused"),
    *("resuming", "stopping", "stopped", "missing", "error"),
)

one_sandbox = click.argument("sandbox_id", metavar="SANDBOX", type=SandboxId())
many_sandboxes = click.argument("sandbox_ids", metavar="SANDBOX…", type=SandboxId(), nargs=-1, required=True)


class SandboxGroup(click.Group):
    """Its commands fail in one line, too."""

    command_class = Command


@click.group(cls=SandboxGroup)
def sandbox() -> None:
    """Create, list, pause, fork and end sandboxes."""


@sandbox.command()
@click.option("-t", "--template", default="minimal", show_default=True, help="What it starts from.")
@click.option("--vcpus", type=int)
@click.option("--memory-mb", type=int)
@click.option(
    "--timeout-sec", type=int, default=0, help="Idle seconds before it is paused; 0: never.", show_default=True
)
@click.option("--metadata", "-m", type=Pair(), multiple=True, help="NAME=VALUE; can be given again.")
@click.option("--env", "-e", "envs", type=Pair(), multiple=True, help="NAME=VALUE for all its processes; likewise.")
@json_option
def create(
    *,
    template: str,
    vcpus: int | None,
    memory_mb: int | None,
    timeout_sec: int,
    metadata: Sequence[tuple[str, str]],
    envs: Sequence[tuple[str, str]],
    as_json: bool,
) -> None:
    """Create a sandbox; prints its id when it runs."""

    async def action(capsule: TrioClient) -> SandboxInfo:
        made = await capsule.sandboxes.create(
            template,
            vcpus=vcpus,
            memory_mb=memory_mb,
            timeout_sec=timeout_sec,
            metadata=as_mapping(metadata),
            envs=as_mapping(envs),
        )
        return made.info

    info = run(action)
    show(info, as_json=as_json, text=info.id)


@sandbox.command("ls")
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="Only these; can be given again.")
@click.option("-q", "--quiet", is_flag=True, help="Ids alone.")
@json_option
def list_sandboxes(*, status: Sequence[str], quiet: bool, as_json: bool) -> None:
    """List sandboxes, newest first; without `--status` all but stopped and failed ones."""

    async def action(capsule: TrioClient) -> list[SandboxInfo]:
        return [one.info async for one in capsule.sandboxes.list(status=list(status) or None)]

    found = run(action)
    if as_json:
        write(as_document(found))
    elif quiet:
        for info in found:
            write(info.id)
    else:
        columns = ("ID", "STATUS", "TEMPLATE", "VCPUS", "MEMORY", "AGE")
        write(table(columns, [_row(info) for info in found]))


@sandbox.command("show")
@one_sandbox
@json_option
def show_sandbox(*, sandbox_id: str, as_json: bool) -> None:
    """Describe a sandbox, also a stopped one (by its whole id)."""

    async def action(capsule: TrioClient) -> SandboxInfo:
        return (await find(capsule, sandbox_id)).info

    info = run(action)
    show(info, as_json=as_json, text=_description(info))


@sandbox.command()
@many_sandboxes
@json_option
def rm(*, sandbox_ids: Sequence[str], as_json: bool) -> None:
    """End sandboxes; everything in them is lost."""
    _each(sandbox_ids, TrioSandbox.delete, as_json=as_json)


@sandbox.command()
@many_sandboxes
@json_option
def pause(*, sandbox_ids: Sequence[str], as_json: bool) -> None:
    """Put sandboxes to rest, with their memory."""
    _each(sandbox_ids, TrioSandbox.pause, as_json=as_json)


@sandbox.command()
@many_sandboxes
@json_option
def resume(*, sandbox_ids: Sequence[str], as_json: bool) -> None:
    """Let paused sandboxes run on."""
    _each(sandbox_ids, TrioSandbox.resume, as_json=as_json)


@sandbox.command()
@one_sandbox
@click.option("-n", "--count", type=click.IntRange(1, 100), default=1, show_default=True)
@json_option
def fork(*, sandbox_id: str, count: int, as_json: bool) -> None:
    """Make copies of a sandbox as it is now, memory and processes too; it runs on."""

    async def action(capsule: TrioClient) -> list[SandboxInfo | ForkFailure]:
        made = await (await find(capsule, sandbox_id)).fork(count)
        return [one.info if isinstance(one, TrioSandbox) else one for one in made]

    items = run(action)
    if as_json:
        write(as_document([{"error": item} if isinstance(item, ForkFailure) else item for item in items]))
    for item in items:
        if isinstance(item, ForkFailure):
            say(f"one copy was not made: {item.message} ({item.code})")
        elif not as_json:
            write(item.id)
    if any(isinstance(item, ForkFailure) for item in items):
        raise click.exceptions.Exit(OWN_FAILURE)


def _each(sandbox_ids: Sequence[str], act: Any, *, as_json: bool) -> None:
    """Do it with each, a few at a time; every failure is told, the others go on. Prints the ids of those done."""
    done: dict[str, str] = {}
    failed: dict[str, str] = {}
    limit = trio.CapacityLimiter(AT_ONCE)

    async def one(capsule: TrioClient, text: str) -> None:
        async with limit:
            try:
                found = await find(capsule, text)
                await act(found)
            except (CapsuleError, Failure) as error:
                failed[text] = error.message if isinstance(error, ApiError | Failure) else str(error)
            else:
                done[text] = found.id

    async def action(capsule: TrioClient) -> None:
        async with trio.open_nursery() as nursery:
            for text in dict.fromkeys(sandbox_ids):
                nursery.start_soon(one, capsule, text)

    run(action)
    ids = [done[text] for text in dict.fromkeys(sandbox_ids) if text in done]
    if as_json:
        write(as_document([{"id": one} for one in ids]))
    elif ids:
        write("\n".join(ids))
    for text, reason in failed.items():
        say(f"{text}: {reason}")
    if failed:
        raise click.exceptions.Exit(OWN_FAILURE)


def _row(info: SandboxInfo) -> tuple[str, ...]:
    memory = f"{info.memory_mb} MiB"
    return info.id, info.status, info.template, str(info.vcpus), memory, ago(info.created_at)


def _description(info: SandboxInfo) -> str:
    metadata = " ".join(f"{name}={value}" for name, value in sorted(info.metadata.items()))
    return fields(
        [
            ("id", info.id),
            ("status", f"{info.status} ({info.reason})" if info.reason else info.status),
            ("template", info.template),
            ("vcpus", info.vcpus),
            ("memory", f"{info.memory_mb} MiB"),
            ("disk", f"{info.disk_mb} MiB"),
            ("timeout", f"{info.timeout_sec} s" if info.timeout_sec else "never"),
            ("host", info.host_id),
            ("address", info.host_ip),
            ("created", info.created_at.isoformat()),
            ("started", info.started_at and info.started_at.isoformat()),
            ("metadata", metadata or None),
        ]
    )
