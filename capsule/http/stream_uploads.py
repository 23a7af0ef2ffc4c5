"""A form whose file may be of any size. With `path` before it the file passes through, and nothing is held; a file
that comes first waits in the spool, for nobody knows yet where it goes."""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from capsule.errors import InvalidRequest, RequestTimeout
from capsule.http import uploads
from capsule.http.uploads import Form, boundary_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from uuid import UUID

    from capsule.http.requests import ApiRequest, RequestBody
    from capsule.http.spool import Spool

FORMATS = {b"": False, b"raw": False, b"tar": True}
"""The part `format` → whether the file is an archive to be unpacked."""

SLOW_BYTES_PER_SECOND = 1024
"""The least pace of a file that passes through: it takes nothing but a place among the sandbox's own streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamUpload:
    """A file on its way. `chunks` ends only when the whole form was sound: an exception from it means that nothing may
    be written. `size`: of the file, where it is known before."""

    path: str
    archive: bool
    size: int | None
    chunks: AsyncIterator[bytes]


@asynccontextmanager
async def receive_stream(request: ApiRequest, spool: Spool, team: UUID) -> AsyncIterator[StreamUpload]:
    """Read the form as far as its file. InvalidRequest for a malformed, cut or wrong one; RequestTimeout,
    UnsupportedMediaType; TooLarge and Busy when the file comes first and `team` has no place for it to wait."""
    form = Form(boundary_of(request), optional=frozenset({"format"}))
    lead, ended = await _until_file(request.body, form)
    if ended:
        form.finish()
    if form.leads("path"):  # one that came behind the file, in the same piece of the body, may be half of it
        path, archive = form.path, _is_archive(form)
        async with aclosing(_pieces(request.body, form, lead, rate=SLOW_BYTES_PER_SECOND, archive=archive)) as chunks:
            yield StreamUpload(path=path, archive=archive, size=None, chunks=chunks)
        return
    async with spool.open_large(team, request.content_length) as content:
        async with aclosing(_pieces(request.body, form, lead, rate=uploads.MIN_BYTES_PER_SECOND)) as pieces:
            async for piece in pieces:
                await content.write(piece)
        path, archive = form.path, _is_archive(form)
        async with aclosing(content.chunks()) as chunks:
            yield StreamUpload(path=path, archive=archive, size=content.size, chunks=chunks)


async def _until_file(body: RequestBody, form: Form) -> tuple[list[bytes], bool]:
    """What has come of the file when it begins; True: the body ended before it was to be expected."""
    pace = Pace(body, uploads.MIN_BYTES_PER_SECOND)
    while chunk := await pace.next():
        content = form.feed(chunk)
        if form.has("file"):
            return content, False
    return [], True


async def _pieces(
    body: RequestBody, form: Form, lead: list[bytes], *, rate: int, archive: bool | None = None
) -> AsyncGenerator[bytes]:
    """The file, as it comes; ends when the form has ended as it should. `archive`: what it is taken for already."""
    pace = Pace(body, rate)
    for piece in lead:
        yield piece
    while chunk := await pace.next():
        for piece in form.feed(chunk):
            yield piece
    form.finish()
    if archive not in {None, _is_archive(form)}:
        raise InvalidRequest("format: must come before `file` when `path` does. Nothing was written.", field="format")


class Pace:
    """A body that must go on coming: a client that sends `rate` bytes a second need not hurry, and one that is slower
    has PATIENCE seconds to give away. What the receiver itself takes its time for does not count."""

    def __init__(self, body: RequestBody, rate: int) -> None:
        self._body = body
        self._rate = rate
        self._left = uploads.PATIENCE

    async def next(self) -> bytes:
        """The next piece, empty at the end. RequestTimeout."""
        chunk, began = b"", trio.current_time()
        with trio.CancelScope(deadline=began + self._left) as scope:
            chunk = await anext(self._body, b"")
        if scope.cancelled_caught:
            raise RequestTimeout(f"The upload came slower than {self._rate} bytes a second; nothing was written.")
        earned = len(chunk) / self._rate - (trio.current_time() - began)
        self._left = min(uploads.PATIENCE, self._left + earned)
        return chunk


def _is_archive(form: Form) -> bool:
    try:
        return FORMATS[form.value("format")]
    except KeyError:
        raise InvalidRequest("format: must be `raw` or `tar`.", field="format") from None
