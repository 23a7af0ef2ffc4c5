"""Frames from hostile clients, without a network."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameProtocol, Opcode

from capsule.http.sockets.frames import (
    MAX_FRAGMENTS,
    MAX_MESSAGE_BYTES,
    NO_STATUS,
    REASON_BYTES,
    BrokenFrames,
    Close,
    Decoder,
    Message,
    Ping,
    Pong,
    binary_frame,
    close_frame,
    cut_reason,
    ping_frame,
    pong_frame,
    text_frame,
)


def frame(opcode, payload=b"", *, fin=True, rsv=0, mask=b"\1\2\3\4", size=None):
    """As a client sends it."""
    size = len(payload) if size is None else size
    head = bytes((fin << 7 | rsv << 4 | opcode,))
    flag = 0x80 if mask else 0
    if size <= 125:
        head += bytes((flag | size,))
    elif size < 65536:
        head += bytes((flag | 126,)) + struct.pack("!H", size)
    else:
        head += bytes((flag | 127,)) + struct.pack("!Q", size)
    if not mask:
        return head + payload
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


def decoded(*pieces):
    decoder = Decoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def test_messages_and_control_frames_between_their_fragments():
    """In the order in which they are whole."""
    assert decoded(
        frame(Opcode.TEXT, b"\xe2\x82", fin=False)
        + frame(Opcode.PING, b"p")
        + frame(Opcode.CONTINUATION, b"\xac")
        + frame(Opcode.BINARY, b"\xff")
        + frame(Opcode.PONG)
        + frame(Opcode.CLOSE, struct.pack("!H", 4999) + "ü".encode())
    ) == [Ping(b"p"), Message("€".encode(), text=True), Message(b"\xff", text=False), Pong(), Close(4999)]


def test_a_close_without_a_code():
    """1005 stands for that."""
    assert decoded(frame(Opcode.CLOSE)) == [Close(NO_STATUS)]
    assert close_frame(NO_STATUS, "") == b"\x88\x00"


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.lists(st.integers(0, 2000), max_size=20))
def test_any_split_of_the_bytes(contents, places):
    """TCP knows no frames."""
    data = b"".join(frame(Opcode.BINARY, content) for content in contents)
    cuts = sorted({place % (len(data) + 1) for place in places})
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert decoded(*pieces) == [Message(content, text=False) for content in contents]


BROKEN = {
    "not masked": (frame(Opcode.TEXT, b"x", mask=b""), 1002),
    "reserved bit": (frame(Opcode.TEXT, b"x", rsv=4), 1002),
    "compressed": (frame(Opcode.BINARY, b"\0" * 50, rsv=4), 1002),
    "unknown opcode": (frame(3, b"x"), 1002),
    "unknown control": (frame(11, b""), 1002),
    "long ping": (frame(Opcode.PING, b"x" * 126), 1002),
    "fragmented ping": (frame(Opcode.PING, b"x", fin=False), 1002),
    "length with its top bit": (frame(Opcode.BINARY, size=2**63), 1002),
    "a length that could be shorter": (b"\x82\xfe\x00\x01\1\2\3\4x", 1002),
    "continuation of nothing": (frame(Opcode.CONTINUATION, b"x"), 1002),
    "message in a message": (frame(Opcode.TEXT, b"x", fin=False) + frame(Opcode.BINARY, b"y"), 1002),
    "bad UTF-8": (frame(Opcode.TEXT, b"\xff"), 1007),
    "bad UTF-8 in two frames": (frame(Opcode.TEXT, b"\xe2", fin=False) + frame(Opcode.CONTINUATION, b"x"), 1007),
    "half a character": (frame(Opcode.TEXT, b"\xe2\x82"), 1007),
    "half a close code": (frame(Opcode.CLOSE, b"\3"), 1002),
    "close code 999": (frame(Opcode.CLOSE, struct.pack("!H", 999)), 1002),
    "close code 1005": (frame(Opcode.CLOSE, struct.pack("!H", 1005)), 1002),
    "close code 5000": (frame(Opcode.CLOSE, struct.pack("!H", 5000)), 1002),
    "bad UTF-8 in a reason": (frame(Opcode.CLOSE, struct.pack("!H", 1000) + b"\xff"), 1007),
    "too large": (frame(Opcode.BINARY, b"x" * (MAX_MESSAGE_BYTES + 1)), 1009),
    "too large in fragments": (
        frame(Opcode.BINARY, b"x" * MAX_MESSAGE_BYTES, fin=False) + frame(Opcode.CONTINUATION, b"x"),
        1009,
    ),
    "too many fragments": (
        frame(Opcode.BINARY, b"x", fin=False) + frame(Opcode.CONTINUATION, b"", fin=False) * MAX_FRAGMENTS,
        1009,
    ),
    "announced too large": (frame(Opcode.BINARY, b"x" * (MAX_MESSAGE_BYTES + 1), size=2**62), 1009),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken(name):
    """Each with the code of RFC 6455 §7.4.1."""
    data, code = BROKEN[name]
    with pytest.raises(BrokenFrames) as caught:
        decoded(data)
    assert caught.value.code == code
    assert caught.value.reason


def test_the_largest_message():
    """Exactly 1 MiB is taken."""
    assert len(decoded(frame(Opcode.BINARY, b"x" * MAX_MESSAGE_BYTES))[0].data) == MAX_MESSAGE_BYTES


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
def test_ours_are_read_by_others(size):
    """wsproto, as a client, finds what was sent."""
    payload = b"x" * size
    client = FrameProtocol(client=True, extensions=[])
    client.receive_bytes(text_frame(payload) + binary_frame(payload) + ping_frame() + pong_frame(payload[:9]))
    client.receive_bytes(close_frame(4409, "why"))
    found = [(one.opcode, one.payload) for one in client.received_frames()]
    assert found == [
        (Opcode.TEXT, payload.decode()),
        (Opcode.BINARY, payload),
        (Opcode.PING, b""),
        (Opcode.PONG, payload[:9]),
        (Opcode.CLOSE, (4409, "why")),
    ]


@given(st.text(max_size=200))
def test_reasons_fit(reason):
    """At most 123 bytes, never half a character."""
    cut = cut_reason(reason)
    assert len(cut) <= REASON_BYTES
    assert reason.encode(errors="replace").startswith(cut)
    cut.decode()
