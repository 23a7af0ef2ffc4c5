"""multipart/form-data with the parts `path` and `file`, in any order, parsed as it arrives with bounded memory."""

from __future__ import annotations

import logging
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from capsule.errors import InvalidRequest, RequestTimeout, TooLarge, UnsupportedMediaType
from capsule.http import fields

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from python_multipart.multipart import MultipartCallbacks

    from capsule.http.requests import ApiRequest
    from capsule.http.spool import Spool, SpooledFile

MAX_FILE_BYTES = 100 * 1024 * 1024
"""The file's content."""

FORM_BYTES = 64 * 1024
"""Everything around it: boundaries, part headers, the path."""

# The parser reports every malformed form as a warning to the log; the client hears it already.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


PATIENCE = 60.0
"""Seconds before the pace of an upload counts; waiting for a place in the spool is among them."""

MIN_BYTES_PER_SECOND = 32 * 1024

PARTS = frozenset({"path", "file"})
"""Both must be there."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A form that has arrived completely."""

    path: str
    content: SpooledFile


@asynccontextmanager
async def receive_upload(request: ApiRequest, spool: Spool, team: UUID) -> AsyncIterator[Upload]:
    """Read the whole form. InvalidRequest for a malformed, cut or wrong one; TooLarge; UnsupportedMediaType; Busy."""
    form = Form(boundary_of(request))
    if (request.content_length or 0) > MAX_FILE_BYTES + FORM_BYTES:
        raise _too_large()
    async with spool.open(team) as content:
        await _receive(request, form, content)
        form.finish()
        yield Upload(form.path, content)


async def _receive(request: ApiRequest, form: Form, content: SpooledFile) -> None:
    """The whole body, at MIN_BYTES_PER_SECOND at least: places in the spool are few. RequestTimeout, TooLarge."""
    total, began = 0, trio.current_time()
    with trio.CancelScope(deadline=began + PATIENCE) as scope:
        async for chunk in request.body:
            total += len(chunk)
            for piece in form.feed(chunk):
                await content.write(piece)
            if content.size > MAX_FILE_BYTES or total > MAX_FILE_BYTES + FORM_BYTES:
                raise _too_large()
            scope.deadline = began + PATIENCE + total / MIN_BYTES_PER_SECOND
    if scope.cancelled_caught:
        raise RequestTimeout(f"The upload came slower than {MIN_BYTES_PER_SECOND} bytes a second; nothing was written.")


class Form:
    """The form as a push parser: `feed` bytes as they come, get the file's bytes back. No I/O.

    `optional`: names of small parts that may come beside PARTS.
    """

    def __init__(self, boundary: bytes, optional: frozenset[str] = frozenset()) -> None:
        self._allowed = PARTS | optional
        self._values: dict[str, bytearray] = {}
        self._part = ""
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._content: list[bytes] = []
        self._around = 0
        self._complete = False
        self._parser = _parser(boundary, self)

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes of the body; give those of the file among them."""
        try:
            self._parser.write(data)
        except FormParserError as err:
            raise InvalidRequest(f"The form is malformed: {err}.") from None
        content, self._content = self._content, []
        # What the parser holds back of the file's end counts, too, until it comes out.
        self._around += len(data) - sum(map(len, content))
        if self._around > FORM_BYTES:
            raise InvalidRequest(f"The form has more than {FORM_BYTES} bytes around the file.")
        return content

    def has(self, name: str) -> bool:
        """Whether that part has begun."""
        return name in self._values

    def leads(self, name: str) -> bool:
        """Whether that part came before the file, and all of it is here."""
        order = list(self._values)
        return name in order and "file" in order and order.index(name) < order.index("file")

    def value(self, name: str) -> bytes:
        """A small part's content so far; empty for one that did not come."""
        return bytes(self._values.get(name, b""))

    @property
    def path(self) -> str:
        """The path in the sandbox; InvalidRequest when it cannot be one."""
        return parse_path(self.value("path"))

    def finish(self) -> None:
        """The body has ended; InvalidRequest unless the form is complete and PARTS came."""
        if not self._complete:
            raise InvalidRequest("The form ends in the middle: its last boundary is missing. Nothing was written.")
        for name in ("path", "file"):
            if name not in self._values:
                raise InvalidRequest(f"{name}: this part is missing.", field=name)

    def on_part_begin(self) -> None:
        """A part starts; its headers follow."""
        self._part = ""
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        """A piece of a header's name."""
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        """A piece of its value."""
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        """A header is complete."""
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def on_headers_finished(self) -> None:
        """A part's content follows."""
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        if kind != b"form-data" or not name:
            raise InvalidRequest("Every part needs a Content-Disposition: form-data with a name.")
        if name not in self._allowed:
            raise InvalidRequest(f"{name[:64]}: there is no such part; send `path` and `file`.", field=name[:64])
        if name in self._values:
            raise InvalidRequest(f"{name}: given twice.", field=name)
        self._values[name] = bytearray()
        self._part = name

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """A piece of a part's content."""
        if self._part == "file":
            self._content.append(data[start:end])
            return
        value = self._values[self._part]
        value += data[start:end]
        if len(value) > fields.MAX_PATH_BYTES:
            raise InvalidRequest(f"{self._part}: longer than {fields.MAX_PATH_BYTES} bytes.", field=self._part)

    def on_end(self) -> None:
        """The last boundary has come."""
        self._complete = True


def parse_path(raw: bytes) -> str:
    """A path in a sandbox: absolute, UTF-8, no NUL, no `..`; else InvalidRequest."""
    try:
        path = raw.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("path: not UTF-8.", field="path") from None
    if not re.search(fields.ABSOLUTE_PATH, path):
        raise InvalidRequest("path: must be absolute, without NUL and without `..`.", field="path")
    return path


def _parser(boundary: bytes, form: Form) -> MultipartParser:
    callbacks: MultipartCallbacks = {
        "on_part_begin": form.on_part_begin,
        "on_part_data": form.on_part_data,
        "on_header_field": form.on_header_field,
        "on_header_value": form.on_header_value,
        "on_header_end": form.on_header_end,
        "on_headers_finished": form.on_headers_finished,
        "on_end": form.on_end,
    }
    try:
        return MultipartParser(boundary, callbacks)
    except FormParserError as err:
        raise InvalidRequest(f"The form is malformed: {err}.") from None


def boundary_of(request: ApiRequest) -> bytes:
    """What stands between the parts. UnsupportedMediaType, InvalidRequest."""
    kind, options = parse_options_header(request.headers.get("Content-Type", ""))
    if kind != b"multipart/form-data":
        raise UnsupportedMediaType("Send the file as multipart/form-data with the parts `path` and `file`.")
    if not options.get(b"boundary"):
        raise InvalidRequest("Content-Type: multipart/form-data needs a boundary.")
    return options[b"boundary"]


def _too_large() -> TooLarge:
    return TooLarge(f"A file may have at most {MAX_FILE_BYTES} bytes (100 MiB).", limit=MAX_FILE_BYTES)
