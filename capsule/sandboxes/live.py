"""Processes that somebody is attached to: consoles, terminals, what was detached and is attached to again."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capsule.model import ProcessExit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from capsule.hosts.links import HostLinks
    from capsule.model import StreamCall, TerminalSize
    from capsule.sandboxes.rows import Placed


class LiveProcess:
    """See `capsule.http.stream_ports.ProcessStream`."""

    pid: int
    tag: str
    terminal: bool
    offset: int
    skipped: int

    async def send(self, data: bytes) -> None:
        raise NotImplementedError

    async def end(self) -> None:
        raise NotImplementedError

    def __aiter__(self) -> AsyncIterator[tuple[int, bytes]]:
        raise NotImplementedError

    async def exit(self) -> ProcessExit:
        raise NotImplementedError

    async def signal(self, number: int) -> None:
        raise NotImplementedError

    async def resize(self, size: TerminalSize) -> None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LiveProcesses:
    """Starts them and attaches to them."""

    links: HostLinks

    @asynccontextmanager
    async def start(self, placed: Placed, call: StreamCall) -> AsyncIterator[LiveProcess]:
        raise NotImplementedError
        yield

    @asynccontextmanager
    async def attach(
        self, placed: Placed, process: int | str, *, offset: int | None, observe: bool
    ) -> AsyncIterator[LiveProcess]:
        raise NotImplementedError
        yield
