"""What streams need from capsule.sandboxes, as `ports.py` says it of the rest: live processes and watches.

Each is an asynchronous context manager: entering it is the question, and raises what is wrong with it; leaving it ends
the stream. Inside, a failure of the host or the guest is a CapsuleError, too: InvalidState when the sandbox was paused
or ended, HostUnavailable when its host or the connection to it was lost, Conflict when somebody else has taken over.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol
from uuid import UUID

from capsule.model import FileContent, FileEvents, ProcessExit, StreamCall, TerminalSize
from capsule.principals import Principal


class ProcessStream(Protocol):
    """A process that somebody is attached to. One task may send, one may iterate, any may signal and resize.

    `offset`: output bytes before the first that comes here; `skipped`: of those, how many this attacher asked for and
    did not get; `replay`: how many from there on had been written when it attached; `ended`: they were its last.
    """

    pid: int
    tag: str
    terminal: bool
    offset: int
    skipped: int
    replay: int
    ended: bool

    async def send(self, data: bytes) -> None:
        """Bytes for its input; waits as long as it does not read. Bytes for a process that has ended are dropped."""
        ...

    async def end(self) -> None:
        """Its input ends here; nothing to a terminal."""
        ...

    def __aiter__(self) -> AsyncIterator[tuple[int, bytes]]:
        """Output as (1 for stdout or the terminal, 2 for stderr; 1 byte to 256 KiB), until it has ended."""
        ...

    async def exit(self) -> ProcessExit:
        """How it ended; after the last output."""
        ...

    async def signal(self, number: int) -> None:
        """To its process group. Not held up by input that waits. Nothing for one that has ended."""
        ...

    async def resize(self, size: TerminalSize) -> None:
        """Of its terminal, likewise; returns at once. Of several in a row the last one counts."""
        ...


class StreamService(Protocol):
    """Live processes and files of the principal's sandboxes. NotFound for another team's sandbox, as for none."""

    def exec(self, principal: Principal, sandbox: UUID, call: StreamCall) -> AbstractAsyncContextManager[ProcessStream]:
        """Start a process. Leaving kills it, or detaches from it as `call` says. InvalidRequest, Conflict for a tag in
        use, TooManyExecs, InvalidState."""
        ...

    def attach(
        self, principal: Principal, sandbox: UUID, process: int | str, *, offset: int | None, observe: bool
    ) -> AbstractAsyncContextManager[ProcessStream]:
        """Attach to a detached one, also to one that has ended lately; leaving detaches. `offset`: output bytes that
        the caller has had, None: replay what is kept. `observe`: look on without taking over. NotFound,
        InvalidRequest."""
        ...

    def watch(
        self, principal: Principal, sandbox: UUID, path: str, *, recursive: bool
    ) -> AbstractAsyncContextManager[AsyncIterator[FileEvents]]:
        """Watch a file or directory; the iterator ends when what is watched is gone. FileNotFound, PermissionDenied."""
        ...

    def read_stream(
        self, principal: Principal, sandbox: UUID, path: str, *, offset: int, length: int | None
    ) -> AbstractAsyncContextManager[FileContent]:
        """A file of any size, from `offset` on. FileNotFound, IsADirectory, …. An exception from the chunks breaks the
        client's connection."""
        ...

    async def write_stream(
        self, principal: Principal, sandbox: UUID, path: str, source: AsyncIterator[bytes], *, size: int | None
    ) -> None:
        """A file of any size, atomically: when `source` fails, or has not `size` bytes, the old one stays."""
        ...

    def read_archive(
        self, principal: Principal, sandbox: UUID, path: str
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """A file or directory with all below it, as a tar stream. An exception from the iterator: it is not whole."""
        ...

    async def write_archive(self, principal: Principal, sandbox: UUID, path: str, source: AsyncIterator[bytes]) -> None:
        """Unpack a tar stream into the directory `path`, which is made if need be; nothing of a broken one arrives."""
        ...
