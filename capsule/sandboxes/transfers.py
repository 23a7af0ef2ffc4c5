"""Files of any size, directories as tar, and watches; bytes pass through, nothing is held.

None of it has a deadline: a transfer takes as long as it takes. What ends it is STALL_SECONDS without a byte.
"""

from __future__ import annotations

import math
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from agent.wire.calls import CONTENT_CHANNEL, NOTICE_CHANNEL
from agent.wire.faults import Fault
from capsule import errors
from capsule.model import FileContent, FileEvent, FileEventKind, FileEvents
from capsule.sandboxes import archives, guest
from capsule.sandboxes.archives import Unpacking
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.flow import FIRST_SECONDS, content, first_notice, pour

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from agent.actor.peer import OpenedStream
    from capsule.hosts.links import HostLinks
    from capsule.sandboxes.rows import Placed

WATCH_SECONDS = 120.0
"""Until a watch begins: a large tree is walked first."""


class Opened(msgspec.Struct, frozen=True):
    """The first notice of files.read. `size`: of what comes; `file_size`: of the whole file. Absent where the file has
    none."""

    size: guest.Count | None = None
    file_size: guest.Count | None = None
    mtime_ns: int | None = None
    inode: int | None = None

    def version(self) -> str | None:
        """Other contents, other version: as good as a file system's time of change."""
        if self.file_size is None or self.mtime_ns is None or self.inode is None:
            return None
        return f"{self.file_size:x}-{self.mtime_ns:x}-{self.inode:x}"


class Happened(msgspec.Struct, frozen=True):
    """One event of a watch."""

    event: FileEventKind
    path: str
    to: str | None = None
    directory: bool = False


class Seen(msgspec.Struct, frozen=True):
    """A notice of files.watch."""

    events: list[Happened] = []
    overflow: bool = False


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """Reads, writes and watches files of sandboxes, for as long as it takes."""

    links: HostLinks

    @asynccontextmanager
    async def read(self, placed: Placed, path: str, *, offset: int, length: int | None) -> AsyncIterator[FileContent]:
        """A file from `offset` on, `length` bytes at most."""
        body: dict[str, Any] = {"path": path}
        if offset:
            body["offset"] = offset
        if length is not None:
            body["length"] = length
        async with self._stream(placed, "files.read", body) as stream:
            first = await first_notice(stream, FIRST_SECONDS)
            opened = guest.notice(Opened, first)
            whole = opened.file_size
            if whole is None and not body.keys() - {"path"}:
                whole = opened.size  # a guest of before, or a file that has no size to begin with
            async with aclosing(content(stream, opened.size)) as chunks:
                yield FileContent(size=whole, version=opened.version(), chunks=chunks)

    async def write(self, placed: Placed, path: str, source: AsyncIterator[bytes], *, size: int | None) -> None:
        """Write a file, atomically."""
        body: dict[str, Any] = {"path": path}
        if size is not None:
            body["size"] = size
        async with self._stream(placed, "files.write", body) as stream:
            await pour(stream, source, CONTENT_CHANNEL)

    @asynccontextmanager
    async def read_archive(self, placed: Placed, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """A file or directory as tar, made by the guest's own."""
        async with self._stream(placed, "files.stat", {"path": path}) as stream:
            await stream.end()
            await stream.reply()
        async with (
            self._stream(placed, "exec", archives.packing(path)) as stream,
            aclosing(archives.packed(stream, path)) as chunks,
        ):
            # A failure of before the first byte is an answer, one of after it only a broken connection.
            first = await anext(chunks, b"")
            async with aclosing(_again(first, chunks)) as all_of_it:
                yield all_of_it

    async def write_archive(self, placed: Placed, path: str, source: AsyncIterator[bytes]) -> None:
        """Unpack a tar stream into a directory, by the guest's own."""
        unpacking = Unpacking(path)
        async with (
            self._stream(placed, "exec", unpacking.question()) as stream,
            aclosing(unpacking.checked(source)) as checked,
        ):
            reply = await pour(stream, checked, CONTENT_CHANNEL, unpacking.hear)
        unpacking.finish(reply)

    @asynccontextmanager
    async def watch(self, placed: Placed, path: str, *, recursive: bool) -> AsyncIterator[AsyncIterator[FileEvents]]:
        """Watch a file or directory until it is gone; leaving ends it."""
        body = {"path": path, **({"recursive": True} if recursive else {})}
        async with self._stream(placed, "files.watch", body) as stream:
            await first_notice(stream, WATCH_SECONDS)
            async with aclosing(_events(stream)) as events:
                yield events

    @asynccontextmanager
    async def _stream(self, placed: Placed, method: str, body: dict[str, Any]) -> AsyncIterator[OpenedStream]:
        question = {"sandbox_id": str(placed.id), "live": True, **body}
        try:
            async with self.links.open_stream(placed.host, method, question, timeout=math.inf) as stream:
                yield stream
        except Fault as fault:
            raise as_error(fault, not_found=errors.FileNotFound) from fault


async def _again(first: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


async def _events(stream: OpenedStream) -> AsyncGenerator[FileEvents]:
    """However long nothing happens. Raises errors as they are told: a nursery of the reader's would hide a Fault in its
    group from whoever translates it outside."""
    try:
        async for channel, data in stream:
            if channel != NOTICE_CHANNEL:
                raise guest.nonsense()
            seen = guest.notice(Seen, data)
            events = tuple(
                FileEvent(event=one.event, path=one.path, to=one.to, directory=one.directory) for one in seen.events
            )
            yield FileEvents(events=events, overflow=seen.overflow)
        await stream.reply()
    except Fault as fault:
        raise as_error(fault, not_found=errors.FileNotFound) from fault
