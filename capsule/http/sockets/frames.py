"""WebSocket frames (RFC 6455) to and from bytes, without I/O: what a hostile client may send, and what of it is kept.

wsproto's frame protocol does the parsing, without extensions: permessage-deflate would let a client send a mebibyte
that unpacks to a gigabyte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from wsproto.frame_protocol import CloseReason, FrameProtocol, Opcode, ParseFailed

MAX_MESSAGE_BYTES = 1024 * 1024
"""Of one message, however many frames it comes in."""

MAX_FRAGMENTS = 16_384
"""Frames of one message: a client that sends them a byte at a time costs more than it is worth."""

REASON_BYTES = 123
"""A control frame has at most 125 bytes, of which the code takes two."""

NO_STATUS = 1005
"""A close frame without a code."""


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message: bytes, of UTF-8 that was checked when it is `text`."""

    data: bytes
    text: bool


@dataclass(frozen=True, slots=True)
class Ping:
    """To be answered with the same payload."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    """An answer to a ping of ours, or not."""


@dataclass(frozen=True, slots=True)
class Close:
    """The client's close frame; nothing follows."""

    code: int


Event = Message | Ping | Pong | Close


class BrokenFrames(Exception):  # noqa: N818 - named for what happened
    """What came is no WebSocket traffic that we take; `code` is for the close frame. Nothing more can be read."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Decoder:
    """Turns a client's bytes, in any pieces, into events. Holds at most one message and a header."""

    def __init__(self) -> None:
        self._frames = FrameProtocol(client=False, extensions=[])
        self._message = bytearray()
        self._fragments = 0

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that `data` completes. BrokenFrames: 1002, 1007, 1009."""
        self._frames.receive_bytes(data)
        try:
            for frame in self._frames.received_frames():
                match frame.opcode:
                    case Opcode.PING:
                        yield Ping(_raw(frame.payload))
                    case Opcode.PONG:
                        yield Pong()
                    case Opcode.CLOSE:
                        yield Close(int(frame.payload[0]))
                    case _:
                        self._add(_raw(frame.payload), ends=frame.frame_finished)
                        if frame.frame_finished and frame.message_finished:
                            yield self._whole(text=frame.opcode is Opcode.TEXT)
        except ParseFailed as err:
            raise BrokenFrames(int(err.code), str(err)) from None

    def _add(self, piece: bytes, *, ends: bool) -> None:
        self._message += piece
        self._fragments += ends
        if len(self._message) > MAX_MESSAGE_BYTES:
            raise BrokenFrames(CloseReason.MESSAGE_TOO_BIG, f"a message has at most {MAX_MESSAGE_BYTES} bytes")
        if self._fragments > MAX_FRAGMENTS:
            raise BrokenFrames(CloseReason.MESSAGE_TOO_BIG, f"a message has at most {MAX_FRAGMENTS} fragments")

    def _whole(self, *, text: bool) -> Message:
        message = Message(bytes(self._message), text)
        self._message.clear()
        self._fragments = 0
        return message


def _raw(payload: bytes | bytearray | str | tuple[int, str]) -> bytes:
    """Text was decoded to be checked; we want the bytes."""
    if isinstance(payload, str):
        return payload.encode()
    if isinstance(payload, tuple):
        raise TypeError("only a close frame has a tuple")
    return bytes(payload)


def text_frame(payload: bytes) -> bytes:
    """`payload` is UTF-8."""
    return _frame(Opcode.TEXT, payload)


def binary_frame(payload: bytes) -> bytes:
    """Of any bytes."""
    return _frame(Opcode.BINARY, payload)


def ping_frame() -> bytes:
    """Without a payload: we ask whether somebody is there, not how long the way is."""
    return _frame(Opcode.PING, b"")


def pong_frame(payload: bytes) -> bytes:
    """With the ping's payload."""
    return _frame(Opcode.PONG, payload)


def close_frame(code: int, reason: str) -> bytes:
    """`reason` is cut to what fits, between two characters. NO_STATUS: without either."""
    if code == NO_STATUS:
        return _frame(Opcode.CLOSE, b"")
    return _frame(Opcode.CLOSE, struct.pack("!H", code) + cut_reason(reason))


def cut_reason(reason: str) -> bytes:
    """As much of `reason` as a close frame holds, in UTF-8."""
    return reason.encode(errors="replace")[:REASON_BYTES].decode(errors="ignore").encode()


def _frame(opcode: Opcode, payload: bytes) -> bytes:
    """RFC 6455 §5.2: FIN and opcode, length, payload; a server does not mask."""
    first, size = 0x80 | opcode, len(payload)
    if size <= 125:
        head = struct.pack("!BB", first, size)
    elif size <= 0xFFFF:
        head = struct.pack("!BBH", first, 126, size)
    else:
        head = struct.pack("!BBQ", first, 127, size)
    return head + payload
