"""Directories, as tar streams: packed and unpacked in a thread, with no more than a few pieces in memory."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast

import trio

from capsule.client import archives
from capsule.client.answers import Transfer
from capsule.client.downloads import READ_TIMEOUT, draft_name
from capsule.client.nurseries import background
from capsule.client.transport import Transport, chunks
from capsule.client.uploads import Form, check_digest, post

Progress = Callable[[int, int | None], None]


async def upload(
    transport: Transport, files: str, source: str | os.PathLike[str], path: str, on_progress: Progress | None
) -> Transfer:
    """What `source` holds, into the directory `path`."""
    write, read = trio.open_memory_channel[bytes](1)
    packing = _Packing(Path(source), write)
    digest, sent = hashlib.sha256(), 0

    async def pieces() -> AsyncGenerator[bytes, None]:
        nonlocal sent
        async for piece in read:
            digest.update(piece)
            yield piece
            sent += len(piece)
            if on_progress is not None:
                on_progress(sent, None)
        if packing.failure is not None:
            raise packing.failure

    async with background() as nursery, read:
        nursery.start_soon(packing.run)
        response = await post(transport, files, Form(path, format="tar"), pieces, None)
    check_digest(response, digest.digest())
    return Transfer(bytes=sent)


async def download(
    transport: Transport, files: str, path: str, target: str | os.PathLike[str], on_progress: Progress | None
) -> Transfer:
    """The directory `path`, as `target`."""
    wanted = Path(target)
    _check_free(wanted)
    draft = draft_name(wanted)
    draft.mkdir()
    try:
        received, skipped = await _receive(transport, files, path, draft, on_progress)
        await trio.to_thread.run_sync(_move, draft, wanted)
    except BaseException:
        with trio.CancelScope(shield=True):  # a thread's work, which ends
            await trio.to_thread.run_sync(_remove, draft)
        raise
    return Transfer(bytes=received, skipped=tuple(skipped))


async def _receive(
    transport: Transport, files: str, path: str, draft: Path, on_progress: Progress | None
) -> tuple[int, list[str]]:
    """Unpack into `draft` while it comes; the bytes that came, and what was left out."""
    write, read = trio.open_memory_channel[bytes](1)
    name = PurePosixPath(path).name or "."
    unpacking = _Unpacking(read, name, draft)
    body = {"path": path, "format": "tar"}
    received = 0
    async with background() as nursery:
        async with (
            transport.stream("POST", f"{files}/stream/read", body=body, read_timeout=READ_TIMEOUT) as response,
            aclosing(chunks(response)) as pieces,
        ):
            nursery.start_soon(unpacking.run)
            async for piece in pieces:
                received += len(piece)
                try:
                    await write.send(piece)
                except trio.BrokenResourceError:
                    break  # it has failed, and says why
                if on_progress is not None:
                    on_progress(received, None)
        write.close()
        await unpacking.done.wait()
    if unpacking.failure is not None:
        raise unpacking.failure
    return received, unpacking.skipped


class _Packing(io.RawIOBase):
    """The file that tar writes to, in its thread: pieces go into a channel.

    Owns: `channel`. Dies when: all is packed, or nobody takes it any more."""

    def __init__(self, source: Path, channel: trio.MemorySendChannel[bytes]) -> None:
        self._source = source
        self._channel = channel
        self._broken = False
        self.failure: OSError | None = None

    async def run(self) -> None:
        """Pack; `failure` when that did not work."""
        async with self._channel:
            try:
                await trio.to_thread.run_sync(archives.pack, self._source, cast("IO[bytes]", self))
            except trio.BrokenResourceError:
                pass  # the upload has failed
            except OSError as exc:
                self.failure = exc

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        piece = bytes(data)  # type: ignore[call-overload]
        if not self._broken:  # tarfile writes on when it is thrown away
            self._broken = True
            trio.from_thread.run(self._channel.send, piece)
            self._broken = False
        return len(piece)


class _Unpacking(io.RawIOBase):
    """The file that tar reads from, in its thread. A stream that breaks off cancels it: it never ends quietly.

    Owns: `channel`. Dies when: all is unpacked, or it fails."""

    def __init__(self, channel: trio.MemoryReceiveChannel[bytes], name: str, target: Path) -> None:
        self._channel = channel
        self._name = name
        self._target = target
        self._rest = b""
        self.done = trio.Event()
        self.skipped: list[str] = []
        self.failure: Exception | None = None

    async def run(self) -> None:
        """Unpack; `done` then, with `failure` when that did not work."""
        try:
            async with self._channel:
                unpack = partial(archives.unpack, cast("IO[bytes]", self), self._name, self._target)
                self.skipped = await trio.to_thread.run_sync(unpack)
                async for _ in self._channel:
                    pass  # what stands behind the end of an archive
        except Exception as exc:  # noqa: BLE001 - to whoever waits
            self.failure = exc
        finally:
            self.done.set()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while not self._rest:
            try:
                self._rest = trio.from_thread.run(self._channel.receive)
            except trio.EndOfChannel:
                return b""
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def _check_free(wanted: Path) -> None:
    if os.path.lexists(wanted):
        raise FileExistsError(f"{wanted} is there already")


def _move(draft: Path, wanted: Path) -> None:
    _check_free(wanted)
    draft.rename(wanted)


def _remove(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)
