"""…/files/stream: files of any size, and directories as tar."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import trio
from msgspec import Meta, Struct

from capsule import errors
from capsule.http import fields, ranges
from capsule.http.errors import error_response
from capsule.http.files import BASE, FORM, ON_PATH
from capsule.http.mounts import under_both_names
from capsule.http.operations import Call, Operation, StreamResponse, Success, no_content
from capsule.http.parsing import check_path
from capsule.http.sockets.websocket import STALL_TIMEOUT
from capsule.http.stream_uploads import receive_stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from quart_trio.wrappers import TrioResponse

    from capsule.http.ports import SandboxService
    from capsule.http.ranges import Range, Span
    from capsule.http.spool import Spool
    from capsule.http.stream_ports import StreamService
    from capsule.model import FileContent

TAR = "application/x-tar"

RECHECK_SECONDS = 30.0
"""How long a transfer goes on after its client has lost the right to it."""

ATTEMPTS = 3
"""Of reading the end of a file that changes all the time."""

Format = Annotated[
    Literal["raw", "tar"],
    Meta(description="`raw`: the bytes of a file. `tar`: a file or directory with all below it, as a tar archive."),
]

STREAM_FORM = {
    "path": FORM["path"],
    "file": {
        "type": "string",
        "format": "binary",
        "description": "The content, of any size if `path` comes before it; else it has to wait in our spool.",
    },
}
OPTIONAL_PARTS = {
    "format": {
        "type": "string",
        "enum": ["raw", "tar"],
        "description": "`tar`: unpack it into the directory `path`. Before `file`, if `path` is.",
    }
}


class ReadStreamBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What to read, and as what."""

    path: fields.Path
    format: Format = "raw"


def operations(service: StreamService, sandboxes: SandboxService, spool: Spool) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = FileStreamHandlers(service, sandboxes, spool)
    return under_both_names([_write(handlers), _read(handlers)])


def _write(handlers: FileStreamHandlers) -> Operation[Any, Any]:
    return Operation(
        name="writeFileStream",
        method="POST",
        path=f"{BASE}/stream/write",
        handler=handlers.write,
        summary="Write a file of any size, or unpack a tar archive",
        description="Replaces the file in one step, and makes missing directories. An upload that breaks off changes "
        "nothing. Send `path` (and `format`) before `file`: then the bytes pass straight through. A third part, "
        "`format`, may say `tar`: the archive is unpacked into the directory `path`, once all of it has come.",
        tag="files",
        form=STREAM_FORM,
        optional_form=OPTIONAL_PARTS,
        successes=(
            Success(
                status=204,
                description="It is written.",
                headers={"Repr-Digest": "SHA-256 of the file's bytes as they were written (RFC 9530)."},
            ),
        ),
        errors=(*ON_PATH, errors.IsADirectory, errors.NotAFile, errors.Busy),
    )


def _read(handlers: FileStreamHandlers) -> Operation[Any, Any]:
    versioned = {"ETag": "Changes when the file does.", "Accept-Ranges": "`bytes`, if the file has a size."}
    octets = "application/octet-stream"
    return Operation(
        name="readFileStream",
        method="POST",
        path=f"{BASE}/stream/read",
        handler=handlers.read,
        summary="Read a file of any size, or a directory as tar",
        description="A failure half-way breaks the connection; it never looks like the end of the file. The header "
        "`Range: bytes=a-b`, with `If-Range` and the ETag of before, goes on where a download broke off; of an archive "
        "there are no ranges. `tar` is answered as `application/x-tar`.",
        tag="files",
        body=ReadStreamBody,
        successes=(
            Success(
                status=200,
                description="All of it.",
                media_type=octets,
                or_media_type=TAR,
                raw=True,
                headers=versioned,
            ),
            Success(
                status=206,
                description="The range that was asked for.",
                media_type=octets,
                raw=True,
                headers={**versioned, "Content-Range": "Which bytes these are, of how many."},
            ),
        ),
        errors=(*ON_PATH, errors.IsADirectory, errors.NotAFile, errors.TooLarge, errors.RangeNotSatisfiable),
    )


class FileStreamHandlers:
    """Parse, ask the service, pass the bytes on."""

    def __init__(self, service: StreamService, sandboxes: SandboxService, spool: Spool) -> None:
        self._service = service
        self._sandboxes = sandboxes
        self._spool = spool

    async def write(self, call: Call[None, None]) -> TrioResponse:
        principal, sandbox = call.principal, call.sandbox
        status = (await self._sandboxes.get(principal, sandbox)).status
        if status != "running":  # before anything waits in the spool for nothing
            raise errors.InvalidState(f"the sandbox is {status}; this needs a running one", status=status)
        digest = hashlib.sha256()
        async with (
            receive_stream(call.request, self._spool, principal.team_id) as upload,
            aclosing(_received(call, upload.chunks, digest)) as source,
        ):
            if upload.archive:
                await self._service.write_archive(principal, sandbox, upload.path, source)
            else:
                await self._service.write_stream(principal, sandbox, upload.path, source, size=upload.size)
        response = no_content()
        response.headers["Repr-Digest"] = f"sha-256=:{b64encode(digest.digest()).decode()}:"
        return response

    async def read(self, call: Call[ReadStreamBody, None]) -> TrioResponse:
        path = check_path(call.body.path)
        if call.body.format == "tar":
            reading = self._service.read_archive(call.principal, call.sandbox, path)
            chunks = await call.request.cleanup.enter_async_context(reading)
            return await _answer(call, chunks, None, TAR)
        # Open until the answer is sent: the connection's stack closes it, in this same task.
        stack = await call.request.cleanup.enter_async_context(AsyncExitStack())
        wanted = ranges.parse(call.request.single_header("Range"))
        return await Reading(self._service, call, path, stack).answer(wanted)


class Reading:
    """One file for one request: looks at what there is before it decides which of it is sent."""

    def __init__(
        self, service: StreamService, call: Call[ReadStreamBody, None], path: str, stack: AsyncExitStack
    ) -> None:
        self._service = service
        self._call = call
        self._path = path
        self._stack = stack

    async def answer(self, wanted: Range | None) -> TrioResponse:
        """The whole of it (200), `wanted` of it (206), or that there is no such part (416)."""
        content = None if wanted is None else await self._find(wanted)
        if wanted is None or content is None or content.size is None:
            return await self._whole()
        span = wanted.within(content.size)
        if span is not None:
            return await self._part(content, span)
        if wanted.suffix and not content.size:
            return await self._whole()  # the last bytes of an empty file are all of it
        size = content.size
        refusal = errors.RangeNotSatisfiable(f"{self._path} has {size} bytes, none of them in the range.", size=size)
        response = error_response(refusal, self._call.request.request_id)
        response.headers["Content-Range"] = f"bytes */{size}"
        return response

    async def _find(self, wanted: Range) -> FileContent | None:
        """The file, open for what is wanted of it; None when all of it is to be sent instead: it changed, it does not
        know its size, or it does not stand still."""
        if_range = self._call.request.single_header("If-Range")
        first, length = (0, 0) if wanted.suffix is not None else (wanted.first, wanted.wanted)
        seen: tuple[int, str | None] | None = None
        for _ in range(ATTEMPTS):
            content = await self._open(first, length)
            if content.size is None or not ranges.still(if_range, content.version):
                return None
            span = wanted.within(content.size)
            if wanted.suffix is None or span is None or (content.size, content.version) == seen:
                return content
            seen = content.size, content.version
            first, length = span.first, span.length
        return None

    async def _open(self, offset: int, length: int | None) -> FileContent:
        await self._stack.aclose()
        reading = self._service.read_stream(
            self._call.principal, self._call.sandbox, self._path, offset=offset, length=length
        )
        return await self._stack.enter_async_context(reading)

    async def _whole(self) -> TrioResponse:
        content = await self._open(0, None)
        response = await _answer(self._call, content.chunks, content.size, "application/octet-stream")
        _describe(response, content)
        return response

    async def _part(self, content: FileContent, span: Span) -> TrioResponse:
        response = await _answer(self._call, content.chunks, span.length, "application/octet-stream")
        response.status_code = 206
        response.headers["Content-Range"] = span.content_range
        _describe(response, content)
        return response


async def _answer(
    call: Call[ReadStreamBody, None], chunks: AsyncIterator[bytes], size: int | None, media_type: str
) -> StreamResponse:
    sent = await call.request.cleanup.enter_async_context(aclosing(_sent(call, chunks)))
    return StreamResponse(sent, size, media_type, patience=STALL_TIMEOUT)


def _describe(response: TrioResponse, content: FileContent) -> None:
    if (tag := ranges.etag(content.version)) is not None:
        response.headers["ETag"] = tag
    if content.size is not None:
        response.headers["Accept-Ranges"] = "bytes"


async def _received(call: Call[Any, Any], chunks: AsyncIterator[bytes], digest: hashlib._Hash) -> AsyncGenerator[bytes]:
    """`chunks`, digested. Its end is leave to write the file: whoever sent it must still be one who may."""
    standing = Standing(call)
    async for chunk in chunks:
        digest.update(chunk)
        await standing.look()
        yield chunk
    await call.renewed()


async def _sent(call: Call[Any, Any], chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    standing = Standing(call)
    async for chunk in chunks:
        await standing.look()
        yield chunk


class Standing:
    """Whether the one who asked for a transfer is still let in; looked up every RECHECK_SECONDS while bytes move."""

    def __init__(self, call: Call[Any, Any]) -> None:
        self._call = call
        self._due = trio.current_time() + RECHECK_SECONDS

    async def look(self) -> None:
        """Raises what a request of now would be refused with. A database that is away for a moment refuses nobody."""
        if trio.current_time() < self._due:
            return
        try:
            await self._call.renewed()
        except errors.CapsuleError as err:
            if err.status < 500:
                raise
        self._due = trio.current_time() + RECHECK_SECONDS
