"""Live processes and files of any size as the HTTP layer sees them (`capsule.http.stream_ports.StreamService`): each
call checks the team first."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from capsule.model import FileContent, FileEvents, StreamCall
    from capsule.principals import Principal
    from capsule.sandboxes.live import LiveProcess, LiveProcesses
    from capsule.sandboxes.rows import SandboxRows
    from capsule.sandboxes.transfers import Transfers


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The use-cases, one method each."""

    rows: SandboxRows
    processes: LiveProcesses
    transfers: Transfers

    @asynccontextmanager
    async def exec(self, principal: Principal, sandbox: UUID, call: StreamCall) -> AsyncIterator[LiveProcess]:
        """See `live.LiveProcesses`."""
        async with self.processes.start(await self.rows.running(principal, sandbox), call) as process:
            yield process

    @asynccontextmanager
    async def attach(
        self, principal: Principal, sandbox: UUID, process: int | str, *, offset: int | None, observe: bool
    ) -> AsyncIterator[LiveProcess]:
        """See `live.LiveProcesses`."""
        placed = await self.rows.running(principal, sandbox)
        async with self.processes.attach(placed, process, offset=offset, observe=observe) as attached:
            yield attached

    @asynccontextmanager
    async def watch(
        self, principal: Principal, sandbox: UUID, path: str, *, recursive: bool
    ) -> AsyncIterator[AsyncIterator[FileEvents]]:
        """See `transfers.Transfers`."""
        async with self.transfers.watch(await self.rows.running(principal, sandbox), path, recursive=recursive) as seen:
            yield seen

    @asynccontextmanager
    async def read_stream(
        self, principal: Principal, sandbox: UUID, path: str, *, offset: int, length: int | None
    ) -> AsyncIterator[FileContent]:
        """See `transfers.Transfers`."""
        placed = await self.rows.running(principal, sandbox)
        async with self.transfers.read(placed, path, offset=offset, length=length) as content:
            yield content

    async def write_stream(
        self, principal: Principal, sandbox: UUID, path: str, source: AsyncIterator[bytes], *, size: int | None
    ) -> None:
        """See `transfers.Transfers`."""
        await self.transfers.write(await self.rows.running(principal, sandbox), path, source, size=size)

    @asynccontextmanager
    async def read_archive(self, principal: Principal, sandbox: UUID, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """See `transfers.Transfers`."""
        async with self.transfers.read_archive(await self.rows.running(principal, sandbox), path) as chunks:
            yield chunks

    async def write_archive(self, principal: Principal, sandbox: UUID, path: str, source: AsyncIterator[bytes]) -> None:
        """See `transfers.Transfers`."""
        await self.transfers.write_archive(await self.rows.running(principal, sandbox), path, source)
