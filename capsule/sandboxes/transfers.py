"""Files of any size, directories as tar, and watches; bytes pass through, nothing is held."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from capsule.hosts.links import HostLinks
    from capsule.model import FileContent, FileEvents
    from capsule.sandboxes.rows import Placed


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """Reads, writes and watches files of sandboxes, for as long as it takes."""

    links: HostLinks

    @asynccontextmanager
    async def read(self, placed: Placed, path: str, *, offset: int, length: int | None) -> AsyncIterator[FileContent]:
        raise NotImplementedError
        yield

    async def write(self, placed: Placed, path: str, source: AsyncIterator[bytes], *, size: int | None) -> None:
        raise NotImplementedError

    @asynccontextmanager
    async def read_archive(self, placed: Placed, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        raise NotImplementedError
        yield

    async def write_archive(self, placed: Placed, path: str, source: AsyncIterator[bytes]) -> None:
        raise NotImplementedError

    @asynccontextmanager
    async def watch(self, placed: Placed, path: str, *, recursive: bool) -> AsyncIterator[AsyncIterator[FileEvents]]:
        raise NotImplementedError
        yield
