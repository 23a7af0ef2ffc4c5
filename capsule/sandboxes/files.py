"""Files of a sandbox: POST …/files/…; bytes pass through, nothing is held."""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.wire.calls import CONTENT_CHANNEL, NOTICE_CHANNEL
from agent.wire.faults import Fault
from capsule import errors
from capsule.sandboxes import guest
from capsule.sandboxes.failures import as_error
from capsule.sandboxes.flow import content, first_notice

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.actor.peer import OpenedStream
    from capsule.hosts.links import HostLinks
    from capsule.model import FileEntry
    from capsule.sandboxes.rows import Placed

CALL_SECONDS = 60.0
TRANSFER_SECONDS = 3600.0
"""For a whole upload or download: the client's own patience is shorter."""
MAX_ENTRIES = 10_000
"""Entries one listing may have."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Reads and writes files of sandboxes."""

    links: HostLinks

    async def write(self, placed: Placed, path: str, size: int, source: AsyncIterator[bytes]) -> None:
        """Write exactly `size` bytes, atomically: when `source` fails the old file stays."""
        async with self._stream(placed, "files.write", {"path": path, "size": size}) as stream:
            async for chunk in source:
                await stream.send(chunk, CONTENT_CHANNEL)
            await stream.end()
            await stream.reply()

    @asynccontextmanager
    async def read(self, placed: Placed, path: str) -> AsyncIterator[tuple[int | None, AsyncIterator[bytes]]]:
        """The file's size when known, and its bytes."""
        async with self._stream(placed, "files.read", {"path": path}) as stream:
            size = guest.notice(guest.Size, await first_notice(stream, CALL_SECONDS)).size
            async with aclosing(content(stream, size)) as chunks:
                yield size, chunks

    async def list(self, placed: Placed, path: str, depth: int) -> list[FileEntry]:
        """Entries below a directory."""
        entries: list[FileEntry] = []
        async with self._stream(placed, "files.list", {"path": path, "depth": depth}, seconds=CALL_SECONDS) as stream:
            await stream.end()
            async for channel, data in stream:
                if channel != NOTICE_CHANNEL:
                    continue
                entries.extend(entry.view() for entry in guest.notice(guest.Batch, data).entries)
                if len(entries) > MAX_ENTRIES:
                    raise errors.TooLarge(f"more than {MAX_ENTRIES} entries; list a sub-directory or less depth")
            await stream.reply()
        return entries

    async def mkdir(self, placed: Placed, path: str) -> FileEntry:
        """Make a directory and its parents."""
        async with self._stream(placed, "files.mkdir", {"path": path}, seconds=CALL_SECONDS) as stream:
            await stream.end()
            return guest.answer(guest.Made, await stream.reply()).entry.view()

    async def remove(self, placed: Placed, path: str) -> None:
        """Remove a file, or a directory with all below it."""
        async with self._stream(placed, "files.remove", {"path": path}, seconds=CALL_SECONDS) as stream:
            await stream.end()
            await stream.reply()

    @asynccontextmanager
    async def _stream(
        self, placed: Placed, method: str, body: dict[str, Any], *, seconds: float = TRANSFER_SECONDS
    ) -> AsyncIterator[OpenedStream]:
        question = {"sandbox_id": str(placed.id), **body}
        try:
            async with self.links.open_stream(placed.host, method, question, timeout=seconds) as stream:
                yield stream
        except Fault as fault:
            raise as_error(fault, not_found=errors.FileNotFound) from fault
