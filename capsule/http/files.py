"""…/files: write, read, list, make directories, remove."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capsule import errors
from capsule.http import fields
from capsule.http.answers import File, Files, MadeDirectory
from capsule.http.bodies import ListFilesBody, PathBody
from capsule.http.mounts import under_both_names
from capsule.http.operations import (
    Call,
    Operation,
    StreamResponse,
    Success,
    json_response,
    no_content,
)
from capsule.http.parsing import check_path
from capsule.http.sandboxes import ON_HOST
from capsule.http.uploads import MAX_FILE_BYTES, receive_upload

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.ports import SandboxService
    from capsule.http.spool import Spool
    from capsule.http.unread import UnreadAnswers

BASE = "/v1/sandboxes/{sandbox_id}/files"
ON_PATH = (
    *ON_HOST,
    errors.FileNotFound,
    errors.NotADirectory,
    errors.PermissionDenied,
    errors.Conflict,
    errors.DiskFull,
    errors.TooManyExecs,
)

FORM = {
    "path": {
        "type": "string",
        "minLength": 1,
        "maxLength": fields.MAX_PATH_BYTES,
        "pattern": fields.ABSOLUTE_PATH,
        "description": "Where to: absolute, at most 4096 bytes, no `..` component.",
    },
    "file": {
        "type": "string",
        "format": "binary",
        "description": f"The content, at most {MAX_FILE_BYTES} bytes.",
    },
}


def operations(service: SandboxService, spool: Spool, unread: UnreadAnswers) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = FileHandlers(service, spool, unread)
    return under_both_names([*_contents(handlers), *_directories(handlers)])


def _contents(handlers: FileHandlers) -> list[Operation[Any, Any]]:
    return [
        Operation(
            name="writeFile",
            method="POST",
            path=f"{BASE}/write",
            handler=handlers.write,
            summary="Write a file",
            description="Replaces it in one step, and makes missing directories. An upload that breaks off changes "
            "nothing. The two parts may come in any order.",
            tag="files",
            form=FORM,
            successes=(Success(status=204, description="It is written."),),
            errors=(*ON_PATH, errors.IsADirectory, errors.NotAFile),
        ),
        Operation(
            name="readFile",
            method="POST",
            path=f"{BASE}/read",
            handler=handlers.read,
            summary="Read a file",
            description="Its bytes. A failure half-way breaks the connection; it never looks like the end of the file.",
            tag="files",
            body=PathBody,
            successes=(Success(status=200, description="The bytes.", media_type="application/octet-stream", raw=True),),
            errors=(*ON_PATH, errors.IsADirectory, errors.NotAFile, errors.TooLarge),
        ),
    ]


def _directories(handlers: FileHandlers) -> list[Operation[Any, Any]]:
    return [
        Operation(
            name="listFiles",
            method="POST",
            path=f"{BASE}/list",
            handler=handlers.list,
            summary="List a directory",
            tag="files",
            body=ListFilesBody,
            successes=(Success(status=200, description="What it holds.", body=Files),),
            errors=(*ON_PATH, errors.TooLarge),
        ),
        Operation(
            name="makeDirectory",
            method="POST",
            path=f"{BASE}/mkdir",
            handler=handlers.mkdir,
            summary="Make a directory",
            description="And its parents. 409 `conflict` when something is there already.",
            tag="files",
            body=PathBody,
            successes=(Success(status=200, description="The new directory.", body=MadeDirectory),),
            errors=ON_PATH,
        ),
        Operation(
            name="removeFile",
            method="POST",
            path=f"{BASE}/remove",
            handler=handlers.remove,
            summary="Remove a file or a directory",
            description="A directory with everything below it.",
            tag="files",
            body=PathBody,
            successes=(Success(status=204, description="It is gone."),),
            errors=ON_PATH,
        ),
    ]


class FileHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: SandboxService, spool: Spool, unread: UnreadAnswers) -> None:
        self._service = service
        self._spool = spool
        self._unread = unread

    async def write(self, call: Call[None, None]) -> TrioResponse:
        sandbox = call.sandbox
        status = (await self._service.get(call.principal, sandbox)).status
        if status != "running":  # before a slow client may take a place in the spool for nothing
            raise errors.InvalidState(f"the sandbox is {status}; this needs a running one", status=status)
        async with receive_upload(call.request, self._spool, call.principal.team_id) as upload:
            content = upload.content
            call = await call.renewed()  # an upload takes its time
            await self._service.write_file(call.principal, sandbox, upload.path, content.size, content.chunks())
        return no_content()

    async def read(self, call: Call[PathBody, None]) -> TrioResponse:
        reading = self._service.read_file(call.principal, call.sandbox, check_path(call.body.path))
        # Open until the answer is sent: the connection's stack closes it, in this same task.
        size, chunks = await call.request.cleanup.enter_async_context(reading)
        return StreamResponse(chunks, size, "application/octet-stream")

    async def list(self, call: Call[ListFilesBody, None]) -> TrioResponse:
        body = call.body
        entries = await self._service.list_files(call.principal, call.sandbox, check_path(body.path), body.depth)
        answer = json_response(Files(entries=[File.of(entry) for entry in entries]))
        return self._unread.admit(call.request, answer)

    async def mkdir(self, call: Call[PathBody, None]) -> TrioResponse:
        entry = await self._service.mkdir(call.principal, call.sandbox, check_path(call.body.path))
        return json_response(MadeDirectory(entry=File.of(entry)))

    async def remove(self, call: Call[PathBody, None]) -> TrioResponse:
        await self._service.remove_file(call.principal, call.sandbox, check_path(call.body.path))
        return no_content()
