"""Cursors: opaque text that says where a page ended, to the microsecond (trap 20: a coarser one drops rows)."""

from __future__ import annotations

import re
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlencode
from uuid import UUID

from capsule.errors import InvalidRequest
from capsule.model import Position

if TYPE_CHECKING:
    from collections.abc import Iterable

CURSOR_FORM = r"^A[A-Za-f][A-Za-z0-9_-]{30}$"
"""A position: 24 bytes in base64url, the first 8 of them microseconds below 2**57 (the year 6536). Every text of this
form is the only spelling of one position."""

PID_CURSOR_FORM = r"^[A-Za-z0-9_-]{12}$"
"""A process id: 9 bytes in base64url, so that whatever a guest calls a pid has a cursor."""

_CURSOR = re.compile(CURSOR_FORM.strip("^$"))
_PID_CURSOR = re.compile(PID_CURSOR_FORM.strip("^$"))
_LAYOUT = struct.Struct(">Q16s")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def encode_position(position: Position) -> str:
    """The cursor for a position (whose time is not before 1970)."""
    micros = (position.created_at - _EPOCH) // _MICROSECOND
    return urlsafe_b64encode(_LAYOUT.pack(micros, position.id.bytes)).decode()


def parse_position(cursor: str) -> Position:
    """The position of a cursor that we gave out; InvalidRequest for anything that we cannot have."""
    if not _CURSOR.fullmatch(cursor):
        raise _invalid()
    micros, id_bytes = _LAYOUT.unpack(urlsafe_b64decode(cursor))
    return Position(_EPOCH + micros * _MICROSECOND, UUID(bytes=id_bytes))


def encode_pid(pid: int) -> str:
    """The cursor of a list ordered by process id."""
    return urlsafe_b64encode(pid.to_bytes(9, "big")).decode()


def parse_pid(cursor: str) -> int:
    """The process id of such a cursor; InvalidRequest for another text."""
    if not _PID_CURSOR.fullmatch(cursor):
        raise _invalid()
    return int.from_bytes(urlsafe_b64decode(cursor), "big")


def next_link(path: str, parameters: Iterable[tuple[str, str]]) -> str:
    """The `Link` header for the next page of a bare array."""
    return f'<{path}?{urlencode(list(parameters))}>; rel="next"'


def _invalid() -> InvalidRequest:
    return InvalidRequest("The cursor is not one that this list gave out.", field="cursor")
