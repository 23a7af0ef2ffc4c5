"""Strict msgpack between frames and bytes. Format: https://github.com/msgpack/msgpack/blob/master/spec.md."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.wire.faults import LocalProtocolError, RemoteProtocolError
from agent.wire.framing import PREFIX_BYTES
from agent.wire.limits import MAX_DEPTH, MAX_FRAME_BYTES
from agent.wire.messages import Failure, Frame, Open, Reply

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)
_SCALARS = (str, bytes, bool, int, float, type(None))


def encode(frame: Frame) -> bytearray:
    """The frame with its length prefix.

    Raises:
        LocalProtocolError: a body holds a value that msgpack has no form for, or the frame is too large.
    """
    out = bytearray(PREFIX_BYTES)
    try:
        _encoder.encode_into(frame, out, PREFIX_BYTES)
    except (TypeError, ValueError, OverflowError, RecursionError) as err:
        raise LocalProtocolError(f"cannot encode {type(frame).__name__}: {err}") from err
    length = len(out) - PREFIX_BYTES
    if length > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"{type(frame).__name__} of {length} bytes; at most {MAX_FRAME_BYTES} fit")
    out[:PREFIX_BYTES] = length.to_bytes(PREFIX_BYTES, "big")
    return out


def decode(payload: bytes) -> Frame:
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
        _check_plain(frame.body, MAX_DEPTH)
    elif isinstance(frame, Failure):
        _check_plain(frame.details, MAX_DEPTH)
    return frame


def _check_plain(value: Any, depth: int) -> None:
    """Refuse bodies with extension types, keys that are not strings, or more than `depth` levels."""
    if isinstance(value, dict):
        if depth == 0 or not all(isinstance(key, str) for key in value):
            raise RemoteProtocolError("body too deep, or a key that is not a string")
        for item in value.values():
            _check_plain(item, depth - 1)
    elif isinstance(value, list):
        if depth == 0:
            raise RemoteProtocolError("body too deep")
        for item in value:
            _check_plain(item, depth - 1)
    elif not isinstance(value, _SCALARS):
        raise RemoteProtocolError(f"body holds a {type(value).__name__}")
