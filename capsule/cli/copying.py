"""`capsule cp`."""

from __future__ import annotations

import os
import posixpath
import signal
import stat
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import click
import trio

from capsule.cli import stdio
from capsule.cli.failures import Failure, say
from capsule.cli.finding import find
from capsule.cli.output import as_document, as_text, json_option, write
from capsule.cli.places import Place, PlaceType
from capsule.cli.progress import Progress
from capsule.cli.running import Command, run
from capsule.cli.signalling import heeded
from capsule.client import ApiError, Transfer, TrioClient
from capsule.client.files import TrioFiles

Kind = Literal["file", "directory"]
SHOWN = 5


@click.command(cls=Command)
@click.argument("sources", metavar="SOURCE…", type=PlaceType(), nargs=-1, required=True)
@click.argument("target", metavar="TARGET", type=PlaceType())
@click.option("-r", "--recursive", is_flag=True, help="Directories, too, with everything below them.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@json_option
def cp(*, sources: Sequence[Place], target: Place, recursive: bool, quiet: bool, as_json: bool) -> None:
    """Copy files into a sandbox, or out of one: one side is SANDBOX:/path, the other a local path, or - for our input
    or output.

    Into a directory that exists, under the source's name; else as TARGET. A file is replaced in one step, when all of
    it has arrived; an upload's SHA-256 is compared with the sandbox's.
    """
    _check(sources, target)
    standard = any(place.standard or _is_special(place) for place in (*sources, target))
    if standard and heeded("SIGINT"):
        # Nothing is half there on our side; and a pipe or terminal that stands still cannot be called off.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    async def action(capsule: TrioClient) -> int:
        named = next(place.sandbox for place in (*sources, target) if place.sandbox is not None)
        files = (await find(capsule, named)).files
        copier = Copier(files, recursive=recursive, shown=not (quiet or as_json), as_json=as_json)
        ended: list[int] = []
        async with trio.open_nursery() as nursery:
            if not standard:
                ended = await nursery.start(_watch_signals, nursery.cancel_scope)
            for source in sources:
                await (copier.download(source, target) if source.sandbox else copier.upload(source, target))
            nursery.cancel_scope.cancel()
        return 128 + ended[0] if ended else 0

    raise click.exceptions.Exit(run(action))


@dataclass(slots=True)
class Copier:
    """Copies one thing after the other."""

    files: TrioFiles
    recursive: bool
    shown: bool
    as_json: bool

    async def upload(self, source: Place, target: Place) -> None:
        """From here into the sandbox."""
        if source.standard:
            path = await self._inside(target, source, "file")
            with opened(stdio.STDIN, "rb") as pipe:
                await self._tell(source, target, lambda show: self.files.upload(pipe, path, on_progress=show))
            return
        kind = local_kind(source.path)
        if kind is None:
            raise Failure(f"{source.path}: there is no such file")
        self._check_kind(source, kind)
        path = await self._inside(target, source, kind)
        send = self.files.upload if kind == "file" else self.files.upload_dir
        await self._tell(source, target, lambda show: send(source.path, path, on_progress=show))

    async def download(self, source: Place, target: Place) -> None:
        """From the sandbox to here."""
        kind = await self._kind(source.path)
        if kind is None:
            raise Failure(f"{source}: there is no such file")
        self._check_kind(source, kind)
        if kind == "directory":
            if target.standard:
                raise Failure("a directory cannot be written to our output")
            path = outside(target, source, kind)
            await self._tell(source, target, lambda show: self.files.download_dir(source.path, path, on_progress=show))
            return
        place: str | int = stdio.STDOUT if target.standard else outside(target, source, kind)
        if isinstance(place, str) and replaceable(place):
            await self._tell(source, target, lambda show: self.files.download(source.path, place, on_progress=show))
            return
        with opened(place, "wb") as pipe:  # a pipe, a device: written to, never replaced
            await self._tell(source, target, lambda show: self.files.download(source.path, pipe, on_progress=show))
            await trio.to_thread.run_sync(pipe.flush)

    async def _inside(self, target: Place, source: Place, kind: Kind) -> str:
        """The path in the sandbox that it comes to."""
        there = await self._kind(target.path)
        if there == "directory" or target.path.endswith("/"):
            if source.standard:
                raise Failure(f"{target} is a directory: name the file in it that our input becomes")
            path = posixpath.join(target.path, source.name) if source.name else target.path
            there = await self._kind(path) if source.name and there else None
        else:
            path = target.path
        if there is not None and there != kind:
            raise Failure(f"{target.sandbox}:{path} is a {there}, which a {kind} does not replace")
        return path.rstrip("/") or "/"

    async def _kind(self, path: str) -> Kind | None:
        """Of what is there in the sandbox."""
        try:
            await self.files.list(path)
        except ApiError as error:
            if error.code in ("file_not_found", "not_a_directory"):
                return None if error.code == "file_not_found" else "file"
            if error.code != "too_large":
                raise
        return "directory"

    def _check_kind(self, source: Place, kind: Kind) -> None:
        if kind == "directory" and not self.recursive:
            raise Failure(f"{source} is a directory; `capsule cp -r` copies it")

    async def _tell(self, source: Place, target: Place, copy: Callable[[Progress], Awaitable[Transfer]]) -> None:
        """Do it, and say how far it is, and what came of it."""
        with closing(Progress(source.name or str(source), self.shown and stdio.is_terminal(stdio.STDERR))) as progress:
            done = await copy(progress)
        if done.skipped:
            more = ", …" if len(done.skipped) > SHOWN else ""
            say(f"{source}: left out as unsafe here: {', '.join(done.skipped[:SHOWN])}{more}")
        if self.as_json:
            names = {"source": as_text(str(source)), "target": as_text(str(target))}
            skipped = [as_text(name) for name in done.skipped]
            text = as_document({**names, "bytes": done.bytes, "sha256": done.sha256, "skipped": skipped})
            sys.stderr.write(text + "\n") if target.standard else write(text)


def outside(target: Place, source: Place, kind: Kind) -> str:
    """The local path that it comes to. A link to a file is followed: what it leads to is replaced."""
    path = target.path
    if local_kind(path) == "directory" and (kind == "file" or source.name):
        path = os.path.join(path, source.name)  # noqa: PTH118 - Path() would lose what a slash at the end says
    elif path.endswith("/") and kind == "file":
        raise Failure(f"{path}: there is no such directory")
    there = local_kind(path)
    if there == "directory" and kind == "directory":
        raise Failure(f"{path} is there already; name another place, or remove it")
    if there is not None and there != kind:
        raise Failure(f"{path} is a {there}, which a {kind} does not replace")
    return os.path.realpath(path)


def local_kind(path: str) -> Kind | None:
    """Of what is there on this machine."""
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return "directory" if stat.S_ISDIR(mode) else "file"


def replaceable(path: str) -> bool:
    """Whether a file can take its place: not that of a device or a pipe."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except FileNotFoundError:
        return True


def _is_special(place: Place) -> bool:
    """A pipe or a device on this machine."""
    return place.sandbox is None and local_kind(place.path) == "file" and not replaceable(place.path)


@contextmanager
def opened(target: int | str, mode: Literal["rb", "wb"]) -> Iterator[BinaryIO]:
    """A descriptor of ours, or a pipe or device. Input as it comes, output whole."""
    given = isinstance(target, int)
    with open(target, mode, buffering=0 if mode == "rb" else -1, closefd=not given) as file:
        yield file


def _check(sources: Sequence[Place], target: Place) -> None:
    """One side is a sandbox, one and the same; the other is here."""
    inside = {source.sandbox for source in sources}
    if len(inside) > 1 or (inside == {None}) == (target.sandbox is None):
        raise click.UsageError("one side is SANDBOX:/path, the other is here; from sandbox to sandbox: cp … - | cp - …")
    if len(sources) == 1:
        return
    if target.standard or any(source.standard for source in sources):
        raise click.UsageError("- stands for one file alone")
    if target.sandbox is None and local_kind(target.path) != "directory":
        raise Failure(f"{target} is not a directory, which several sources need")
    if target.sandbox is not None and not target.path.endswith("/"):
        raise click.UsageError(f"several sources go into a directory: {target}/")


async def _watch_signals(
    scope: trio.CancelScope, task_status: trio.TaskStatus[list[int]] = trio.TASK_STATUS_IGNORED
) -> None:
    """What is half there is removed before we end."""
    ended: list[int] = []
    watched = heeded("SIGTERM", "SIGHUP")
    if not watched:
        task_status.started(ended)
        return
    with trio.open_signal_receiver(*watched) as received:
        task_status.started(ended)
        async for number in received:
            ended.append(number)
            scope.cancel()
            return
