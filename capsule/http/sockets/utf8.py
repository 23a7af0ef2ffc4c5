"""Output as text where it is text: cuts a stream of bytes, in any pieces, into characters and what is none.

Decoding is Python's own (RFC 3629: no surrogates, no overlong forms). No I/O.
"""

from __future__ import annotations

import codecs

MAX_PIECES = 16
"""Pieces of one chunk. Of a binary file every other byte would be a piece of its own."""


class Utf8Cutter:
    """One stream. Concatenating all pieces, text encoded again, gives exactly the bytes that were fed.

    A character is never cut: its first bytes wait for the rest, of which there are at most three.
    """

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> list[str | bytes]:
        """The pieces that `data` completes, none empty: str for characters, bytes for what is no UTF-8."""
        data = self._held + data
        self._held = data[len(data) - _incomplete(data) :]
        return _cut(data[: len(data) - len(self._held)])

    def end(self) -> list[str | bytes]:
        """What is left of a character that will not be completed."""
        held, self._held = self._held, b""
        return [held] if held else []


def _cut(data: bytes) -> list[str | bytes]:
    pieces: list[str | bytes] = []
    at = 0
    view = memoryview(data)
    while at < len(data):
        try:
            pieces.append(codecs.utf_8_decode(view[at:], "strict", True)[0])
        except UnicodeDecodeError as err:
            start, stop = at + err.start, at + err.end
            if err.start:
                pieces.append(codecs.utf_8_decode(view[at:start], "strict", True)[0])
            if len(pieces) >= MAX_PIECES:
                stop = len(data)
            _add_bytes(pieces, data[start:stop])
            at = stop
        else:
            break
    return pieces


def _add_bytes(pieces: list[str | bytes], data: bytes) -> None:
    """One piece for bad bytes that follow each other."""
    if pieces and isinstance(last := pieces[-1], bytes):
        pieces[-1] = last + data
    else:
        pieces.append(data)


def _incomplete(data: bytes) -> int:
    """How many bytes at the end (0 to 3) are the beginning of a character."""
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead & 0xC0 == 0x80:
            continue  # in the middle of one: its beginning is farther back
        if lead < 0xC2 or lead > 0xF4 or _length(lead) <= size:
            return 0
        try:
            codecs.utf_8_decode(data[-size:], "strict", False)
        except UnicodeDecodeError:
            return 0  # such as E0 80: nothing can make that right
        return size
    return 0


def _length(lead: int) -> int:
    """Bytes of the character that begins with `lead`."""
    return 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
