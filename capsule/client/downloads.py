"""Downloads: into a temporary file beside the target, resumed where the connection broke (RFC 9110 §13.1.5, §14)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import trio

from capsule.client.answers import Transfer
from capsule.client.errors import ConnectionLost, IntegrityError, Unavailable
from capsule.client.transport import Transport, backoff, chunks

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 8
"""In a row that bring nothing."""

BATCH_BYTES = 512 * 1024
BATCH_SECONDS = 0.1
"""So much is collected for one write: a hop to a thread costs more than the copy."""

READ_TIMEOUT = 90.0
PARTIAL = 206


async def download(
    transport: Transport,
    files: str,
    path: str,
    target: str | os.PathLike[str] | BinaryIO,
    on_progress: Callable[[int, int | None], None] | None,
    *,
    resume: bool,
) -> Transfer:
    """A file of the sandbox to the disk, or into one that is open."""
    if not isinstance(target, (str, os.PathLike)):
        return await Download(transport, files, path, target, on_progress, resume=resume, rewind=False).run()
    async with draft(Path(target)) as file:
        return await Download(transport, files, path, file, on_progress, resume=resume, rewind=True).run()


class Download:
    """A file on its way. `rewind`: what was written can be taken back."""

    def __init__(
        self,
        transport: Transport,
        files: str,
        path: str,
        target: BinaryIO,
        on_progress: Callable[[int, int | None], None] | None,
        *,
        resume: bool,
        rewind: bool,
    ) -> None:
        self._transport = transport
        self._route = f"{files}/stream/read"
        self._body = {"path": path}
        self._target = target
        self._on_progress = on_progress
        self._resume = resume
        self._rewind = rewind
        self._digest = hashlib.sha256()
        self._done = 0
        self._size: int | None = None
        self._version: str | None = None

    async def run(self) -> Transfer:
        """All of it. ConnectionLost when it breaks and cannot go on."""
        failures = 0
        while True:
            before = self._done
            try:
                await self._attempt()
                return Transfer(bytes=self._done, sha256=self._digest.hexdigest())
            except (ConnectionLost, Unavailable) as exc:
                if isinstance(exc, Unavailable) and not self._done:
                    raise  # it has not begun: the caller's to decide
                failures = 1 if self._done > before else failures + 1
                if not self._resume or failures >= ATTEMPTS or (self._version is None and not self._rewind):
                    raise
            await trio.sleep(backoff(failures))

    async def _attempt(self) -> None:
        headers = {"Accept-Encoding": "identity"}
        if self._done and self._version is not None:
            headers |= {"Range": f"bytes={self._done}-", "If-Range": self._version}
        if self._done and self._done == self._size:
            return
        async with self._transport.stream(
            "POST", self._route, body=self._body, headers=headers, read_timeout=READ_TIMEOUT
        ) as response:
            await self._begin(response)
            async with aclosing(chunks(response)) as pieces, aclosing(_batches(pieces)) as batches:
                async for batch in batches:
                    await trio.to_thread.run_sync(self._write, batch)
                    if self._on_progress is not None:
                        self._on_progress(self._done, self._size)
        if self._size is not None and self._done != self._size:
            raise ConnectionLost(f"the server sent {self._done} of {self._size} bytes")

    async def _begin(self, response: httpx.Response) -> None:
        """What is coming: the rest, or all of it (again, if the file has changed)."""
        if response.status_code == PARTIAL:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {self._done}-"):
                raise IntegrityError("the server sent another part of the file than it was asked for")
            return
        if self._done:
            if not self._rewind:
                raise IntegrityError("the file changed while it was downloaded")
            await trio.to_thread.run_sync(self._start_over)
        length = response.headers.get("Content-Length", "")
        self._size = int(length) if length.isdigit() else None
        self._version = response.headers.get("ETag")

    def _write(self, piece: bytes) -> None:
        self._target.write(piece)
        self._digest.update(piece)
        self._done += len(piece)

    def _start_over(self) -> None:
        self._target.seek(0)
        self._target.truncate()
        self._digest, self._done = hashlib.sha256(), 0


async def _batches(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """What came within a moment, as one; also what came before it broke off."""
    held: list[bytes] = []
    size, began = 0, trio.current_time()
    lost: ConnectionLost | None = None
    try:
        async for piece in pieces:
            held.append(piece)
            size += len(piece)
            if size >= BATCH_BYTES or trio.current_time() - began >= BATCH_SECONDS:
                yield b"".join(held)
                held.clear()
                size, began = 0, trio.current_time()
    except ConnectionLost as exc:
        lost = exc
    if held:
        yield b"".join(held)
    if lost is not None:
        raise lost


@asynccontextmanager
async def draft(target: Path) -> AsyncIterator[BinaryIO]:
    """A temporary file that becomes `target`, whole and on the disk, when the body ends well; else it vanishes."""
    file, name = await trio.to_thread.run_sync(_create, target)
    try:
        yield file
        await trio.to_thread.run_sync(_settle, file, name, target)
    except BaseException:
        file.close()
        name.unlink(missing_ok=True)
        raise


def _create(target: Path) -> tuple[BinaryIO, Path]:
    """With the old file's permission bits, or those that a new one gets."""
    name = draft_name(target)
    try:
        mode = target.stat().st_mode & 0o777
    except OSError:
        return name.open("xb"), name
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(name, flags, 0o600), "wb")
    with contextlib.suppress(OSError):  # not before: what was private is so at every moment
        name.chmod(mode)
    return file, name


def draft_name(target: Path) -> Path:
    """Beside it, and no longer than a name may be: 255 bytes, of which a letter has up to four."""
    return target.with_name(f".{target.name[:50]}.{secrets.token_hex(6)}.part")


def _settle(file: BinaryIO, name: Path, target: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
    name.replace(target)
    if hasattr(os, "O_DIRECTORY"):  # Windows has nothing of the kind
        with _directory(target.parent) as handle:
            os.fsync(handle)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    """To be brought to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)
