"""Strict msgpack between frames and bytes. Format: https://github.com/msgpack/msgpack/blob/master/spec.md."""

from __future__ import annotations

import struct
from itertools import chain
from typing import Any

import msgspec

from agent.wire.faults import FrameTooLargeError, LocalProtocolError, RemoteProtocolError
from agent.wire.framing import PREFIX_BYTES
from agent.wire.limits import MAX_DEPTH, MAX_FRAME_BYTES
from agent.wire.messages import Body, Failure, Frame, Open, Reply

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)
_DATA_HEADER = struct.Struct(">IBBBIBBBI")
"""Length; array of 4; tag; uint 32: stream; uint 8: channel; bin 32: payload."""

_SCALARS = frozenset({str, bytes, bool, int, float, type(None)})
_PLAIN = _SCALARS | {dict, list}


def encode(frame: Frame) -> bytearray:
    """The frame with its length prefix. Whatever the peer would refuse is refused here: a bad body must fail its own
    call, not the connection of all others.

    Raises:
        FrameTooLargeError: the frame has more bytes than a frame may have.
        LocalProtocolError: a field out of its range, or a body that is not plain data or too deep.
    """
    out = bytearray(PREFIX_BYTES)
    try:
        _encoder.encode_into(frame, out, PREFIX_BYTES)
    except (TypeError, ValueError, OverflowError, RecursionError) as err:
        raise LocalProtocolError(f"cannot encode {type(frame).__name__}: {err}") from err
    length = len(out) - PREFIX_BYTES
    if length > MAX_FRAME_BYTES:
        raise FrameTooLargeError(f"{type(frame).__name__} of {length} bytes; at most {MAX_FRAME_BYTES} fit")
    try:
        decode(memoryview(out)[PREFIX_BYTES:])
    except RemoteProtocolError as err:
        raise LocalProtocolError(f"the peer would refuse this {type(frame).__name__}: {err}") from err
    out[:PREFIX_BYTES] = length.to_bytes(PREFIX_BYTES, "big")
    return out


def encode_data_header(stream: int, channel: int, length: int) -> bytes:
    """The first bytes of a DATA frame with a payload of `length` bytes, which follow as they are.

    Bulk data is not copied into a frame for that; the ranges of the arguments are the caller's business.
    """
    frame_bytes = _DATA_HEADER.size - PREFIX_BYTES + length
    return _DATA_HEADER.pack(frame_bytes, 0x94, 2, 0xCE, stream, 0xCC, channel, 0xC6, length)


def decode(payload: bytes | memoryview, max_depth: int = MAX_DEPTH) -> Frame:
    """The frame in `payload` (without its prefix).

    Raises:
        RemoteProtocolError: not msgpack, not a known frame, a field out of its range, a body too deep or with values
            that are not plain data.
    """
    try:
        frame = _decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, ValueError, TypeError) as err:
        raise RemoteProtocolError(f"not a frame: {err}") from err
    if isinstance(frame, Open | Reply):
        _check_plain(frame.body, max_depth)
    elif isinstance(frame, Failure):
        _check_plain(frame.details, max_depth)
    return frame


def _check_plain(body: Body, max_depth: int) -> None:
    """Refuse extension types, keys that are not strings, and more than `max_depth` levels.

    Level by level with the interpreter's own loops: a hostile frame can hold two million values, and a Python call
    for each would hold the event loop for half a second.
    """
    if _SCALARS.issuperset(map(type, body.values())):
        return
    level: list[Any] = [body]
    for _ in range(max_depth):
        maps = [value for value in level if type(value) is dict]
        if not {str}.issuperset(map(type, chain.from_iterable(maps))):
            raise RemoteProtocolError("body with a key that is not a string")
        lists = [value for value in level if type(value) is list]
        level = [*chain.from_iterable(map(dict.values, maps)), *chain.from_iterable(lists)]
        kinds = set(map(type, level))
        if not kinds <= _PLAIN:
            raise RemoteProtocolError(f"body holds a {(kinds - _PLAIN).pop().__name__}")
        if kinds <= _SCALARS:
            return
    raise RemoteProtocolError(f"body of more than {max_depth} levels")
