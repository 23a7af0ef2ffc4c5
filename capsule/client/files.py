"""Files and directories in a sandbox."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import BinaryIO

from msgspec import Struct

from capsule.client import directories, downloads, uploads, watches
from capsule.client.answers import FileEntry, Transfer
from capsule.client.transport import Transport
from capsule.client.watches import Watch

Progress = Callable[[int, int | None], None]
"""Called with the bytes that have gone so far, and how many there are, None when nobody knows."""

LocalPath = str | os.PathLike[str]


class TrioFiles:
    """The files of a sandbox. Paths in it are absolute. NotFound (`file_not_found`), Forbidden (`permission_denied`),
    InvalidRequest (`is_a_directory`, …), Conflict (`disk_full`, …)."""

    def __init__(self, transport: Transport, sandbox: str) -> None:
        self._transport = transport
        self._path = f"{sandbox}/files"

    async def read(self, path: str) -> bytes:
        """A file's content, in memory. For large ones: `download`."""
        response = await self._transport.send("POST", f"{self._path}/read", body={"path": path}, again=True)
        return response.content

    async def write(self, path: str, data: bytes | str) -> None:
        """Replace a file, in one step; directories on the way are made. At most 100 MiB; `upload` takes any size."""
        content = data.encode() if isinstance(data, str) else data
        await uploads.write(self._transport, f"{self._path}/write", path, content)

    async def upload(self, source: LocalPath | BinaryIO, path: str, *, on_progress: Progress | None = None) -> Transfer:
        """Copy a local file (its path, or a binary file that is open, from where it stands) into the sandbox, of any
        size, a piece at a time. Replaces the target in one step: an upload that breaks off changes nothing, and is
        not repeated.

        IntegrityError when the server has received something else.
        """
        return await uploads.upload(self._transport, self._path, source, path, on_progress)

    async def download(
        self, path: str, target: LocalPath | BinaryIO, *, on_progress: Progress | None = None, resume: bool = True
    ) -> Transfer:
        """Copy a file out of the sandbox, of any size. `target`: a local path, replaced in one step when all is
        there; or a binary file that is open for writing.

        `resume`: after a lost connection go on where it broke off, a few times; begin again when the file has changed
        (into an open file that cannot be: IntegrityError).
        """
        return await downloads.download(self._transport, self._path, path, target, on_progress, resume=resume)

    async def upload_dir(self, source: LocalPath, path: str, *, on_progress: Progress | None = None) -> Transfer:
        """Copy what a local directory holds into the directory `path`, which is made if need be. Nothing of an upload
        that breaks off arrives."""
        return await directories.upload(self._transport, self._path, source, path, on_progress)

    async def download_dir(self, path: str, target: LocalPath, *, on_progress: Progress | None = None) -> Transfer:
        """Copy a directory out of the sandbox, to a local path where nothing is yet (else FileExistsError); it appears
        when all of it is there.

        The sandbox is not trusted: names and links that lead out of the directory, devices and the like are left out
        and told in `skipped`; owners and set-uid bits do not come along.
        """
        return await directories.download(self._transport, self._path, path, target, on_progress)

    async def list(self, path: str, *, depth: int = 1) -> list[FileEntry]:
        """What a directory holds, `depth` levels down."""
        body = {"path": path, "depth": depth}
        answer = await self._transport.call(_Entries, "POST", f"{self._path}/list", body=body, again=True)
        return answer.entries

    async def mkdir(self, path: str) -> FileEntry:
        """Make a directory, and its parents. Conflict when something is there already."""
        return (await self._transport.call(_Entry, "POST", f"{self._path}/mkdir", body={"path": path})).entry

    async def remove(self, path: str) -> None:
        """Remove a file, or a directory with everything below it."""
        await self._transport.send("POST", f"{self._path}/remove", body={"path": path})

    def watch(self, path: str, *, recursive: bool = False) -> AbstractAsyncContextManager[Watch]:
        """Events of a file or directory, from when the context is entered: `async for event in watch`. It ends when
        what is watched is gone."""
        return watches.opened(self._transport, self._path, path, recursive=recursive)


class _Entries(Struct):
    entries: list[FileEntry]


class _Entry(Struct):
    entry: FileEntry
