"""Uploads: multipart/form-data (RFC 7578) as a stream, the path first: then nobody on the way holds the file."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, BinaryIO

import trio

from capsule.client.answers import Transfer
from capsule.client.errors import IntegrityError
from capsule.client.transport import Transport

if TYPE_CHECKING:
    import httpx

CHUNK = 256 * 1024
FINISH_TIMEOUT = 900.0
"""Seconds for the sandbox to bring all of it to its disk."""


class Form:
    """The bytes around the file's."""

    def __init__(self, path: str, **fields: str) -> None:
        self._boundary = secrets.token_hex(16)
        parts = {"path": path, **fields}
        before = "".join(f"{self._part(name)}\r\n\r\n{text}\r\n" for name, text in parts.items())
        file = f'{self._part("file")}; filename="file"\r\nContent-Type: application/octet-stream\r\n\r\n'
        self.head = (before + file).encode()
        self.tail = f"\r\n--{self._boundary}--\r\n".encode()

    def headers(self, size: int | None) -> dict[str, str]:
        """For a file of this size; unknown: chunked."""
        kind = {"Content-Type": f"multipart/form-data; boundary={self._boundary}"}
        if size is None:
            return {**kind, "Transfer-Encoding": "chunked"}
        return {**kind, "Content-Length": str(len(self.head) + size + len(self.tail))}

    @asynccontextmanager
    async def around(self, source: AsyncGenerator[bytes, None]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The body. Both generators end with the context, whatever happens to the request."""
        async with aclosing(source), aclosing(self._framed(source)) as body:
            yield body

    async def _framed(self, source: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        yield self.head
        async for piece in source:
            yield piece
        yield self.tail

    def _part(self, name: str) -> str:
        return f'--{self._boundary}\r\nContent-Disposition: form-data; name="{name}"'


async def write(transport: Transport, route: str, path: str, content: bytes) -> None:
    """A file from memory. The same once more is the same: it may be repeated."""
    form = Form(path)
    await transport.send(
        "POST",
        route,
        headers=form.headers(len(content)),
        content=lambda: form.around(_whole(content)),
        read_timeout=FINISH_TIMEOUT,
        again=True,
    )


async def upload(
    transport: Transport,
    files: str,
    source: str | os.PathLike[str] | BinaryIO,
    path: str,
    on_progress: Callable[[int, int | None], None] | None,
) -> Transfer:
    """A file from the disk, or one that is open."""
    if isinstance(source, (str, os.PathLike)):
        opened = await trio.to_thread.run_sync(open, source, "rb")
        try:
            return await _upload(transport, files, opened, path, on_progress)
        finally:
            opened.close()
    return await _upload(transport, files, source, path, on_progress)


async def _upload(
    transport: Transport,
    files: str,
    file: BinaryIO,
    path: str,
    on_progress: Callable[[int, int | None], None] | None,
) -> Transfer:
    size = await trio.to_thread.run_sync(_remaining, file)
    digest, sent = hashlib.sha256(), 0

    def read() -> bytes:
        piece = file.read(CHUNK if size is None else min(CHUNK, size - sent))  # not what is appended meanwhile
        digest.update(piece)
        return piece

    async def pieces() -> AsyncGenerator[bytes, None]:
        nonlocal sent
        while piece := await trio.to_thread.run_sync(read):
            sent += len(piece)
            yield piece
            if on_progress is not None:
                on_progress(sent, size)
        if size is not None and sent != size:
            raise IntegrityError(f"the file changed while it was read: it had {size} bytes, now {sent}")

    response = await post(transport, files, Form(path), pieces, size)
    check_digest(response, digest.digest())
    return Transfer(bytes=sent, sha256=digest.hexdigest())


async def post(
    transport: Transport,
    files: str,
    form: Form,
    source: Callable[[], AsyncGenerator[bytes, None]],
    size: int | None,
) -> httpx.Response:
    """Send the form; the server's answer, which is a success. Once: a source may not come twice."""
    return await transport.send(
        "POST",
        f"{files}/stream/write",
        headers=form.headers(size),
        content=lambda: form.around(source()),
        read_timeout=FINISH_TIMEOUT,
    )


def check_digest(response: httpx.Response, digest: bytes) -> None:
    """Compare with the server's Repr-Digest (RFC 9530). IntegrityError, also when there is none."""
    ours = f"sha-256=:{b64encode(digest).decode()}:"
    theirs = [part.strip() for part in response.headers.get("Repr-Digest", "").split(",")]
    if ours not in theirs:
        raise IntegrityError("what the server has written is not what was sent; upload it again")


def _remaining(file: BinaryIO) -> int | None:
    """Bytes from where an open file stands; None for one that does not know, such as a pipe, and where none are."""
    try:
        position = file.tell()
        end = file.seek(0, io.SEEK_END)
        file.seek(position)
    except (OSError, AttributeError):
        return None
    return max(end - position, 0) or None  # or it does not say: /proc, a device


async def _whole(content: bytes) -> AsyncGenerator[bytes, None]:
    await trio.lowlevel.checkpoint()
    for start in range(0, len(content), CHUNK):
        yield content[start : start + CHUNK]
