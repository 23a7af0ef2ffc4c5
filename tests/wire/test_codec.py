"""Frames and bytes: everything ours survives the trip, nothing else comes in or goes out."""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import sys
import tracemalloc
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.wire.codec import decode, encode, encode_data_header
from agent.wire.faults import FrameTooLargeError, LocalProtocolError, RemoteProtocolError
from agent.wire.framing import PREFIX_BYTES
from agent.wire.limits import MAX_FRAME_BYTES
from agent.wire.messages import Cancel, Credit, Data, Failure, Frame, Goaway, Hello, Open, Ping, Reply

KINDS = get_args(Frame)
pack = msgspec.msgpack.encode
frames = st.one_of(*(st.from_type(kind) for kind in KINDS))


@given(frame=frames)
def test_any_frame_survives_the_trip(frame):
    """decode(encode(frame)) is the frame, and the prefix says how long it is."""
    encoded = bytes(encode(frame))
    assert int.from_bytes(encoded[:PREFIX_BYTES], "big") == len(encoded) - PREFIX_BYTES
    assert decode(encoded[PREFIX_BYTES:]) == frame


@pytest.mark.parametrize(
    ("frame", "array"),
    [
        (Hello(1, ["a"], 5, 6), [0, 1, ["a"], 5, 6]),
        (Open(1, "m", {"k": 1}, 7), [1, 1, "m", {"k": 1}, 7]),
        (Data(2, 3, b"x"), [2, 2, 3, b"x"]),
        (Reply(2, {}), [4, 2, {}]),
        (Failure(2, "busy", "no", True, {}), [5, 2, "busy", "no", True, {}]),
        (Credit(2, 9), [6, 2, 9]),
        (Cancel(2), [7, 2]),
        (Ping(3), [8, 3]),
        (Goaway("draining", "bye"), [10, "draining", "bye"]),
    ],
)
def test_a_frame_is_the_array_the_document_says(frame, array):
    """The bytes are those of docs/protocol.md's table, which the guest daemon in C implements, too."""
    assert msgspec.msgpack.decode(bytes(encode(frame)[PREFIX_BYTES:])) == array
    assert decode(pack(array)) == frame


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",  # the one byte msgpack never uses
        pack({"tag": 3, "stream": 1}),
        pack([]),
        pack([11, 1]),  # unknown tag
        pack([-1, 1]),
        pack(["3", 1]),
        pack([3]),  # a field too few
        pack([3, 1, 2]),  # a field too many
        pack([3, 1]) + b"\x00",  # bytes behind the frame
        pack([3, 1])[:-1],
        pack([3, 0]),
        pack([3, -1]),
        pack([3, True]),
        pack([3, 1.5]),
        pack([3, None]),
        pack([3, "1"]),
        pack([2, 1, 0, "text instead of bin"]),
        pack([2, 1, 0, b""]),
        pack([1, 1, b"bin instead of str", {}, 0]),
        pack([1, 1, "m", [], 0]),
        pack([1, 1, "m", {1: 2}, 0]),
        pack([1, 1, "m", {"deep": {1: 2}}, 0]),
        pack([1, 1, "m", {"deep": [{b"k": 2}]}, 0]),
        pack([4, 1, {"t": dt.datetime.now(dt.UTC)}]),
        pack([4, 1, {"t": [msgspec.msgpack.Ext(5, b"x")]}]),
        pack([4, 1, msgspec.msgpack.Ext(5, b"x")]),
        pack([5, 1, "c", "m", 1, {}]),  # retryable must be a bool
        pack([5, 1, "c", "m", True, {"t": msgspec.msgpack.Ext(-1, b"nonsense")}]),
        b"\x93\x04\x01\x81\xa1\xffx\x01",  # a key that is not UTF-8
        b"\x93\x04\x01\x81\xa1k\xdd\xff\xff\xff\xff",  # an array of 4 billion that is not there
        b"\x93\x04\x01\x81\xa1k\xdf\xff\xff\xff\xff",
        b"\x93\x04\x01\x81\xa1k\xc6\xff\xff\xff\xff",
        b"\x93\x04\x01\x81\xa1k" + b"\x91" * 100_000,  # nesting without end
        b"\x91" * 100_000,
    ],
    ids=lambda payload: payload[:12].hex(),
)
def test_what_is_not_a_frame_is_the_peers_fault(payload):
    """Whatever is wrong with a payload, it is RemoteProtocolError and nothing else."""
    with pytest.raises(RemoteProtocolError):
        decode(payload)


@given(payload=st.binary(max_size=100))
def test_random_bytes_never_raise_anything_else(payload):
    """Random payloads decode to a frame or raise RemoteProtocolError."""
    try:
        frame = decode(payload)
    except RemoteProtocolError:
        return
    assert isinstance(frame, KINDS)


@given(frame=frames, at=st.integers(0, 10_000), to=st.integers(0, 255))
def test_a_changed_byte_never_raises_anything_else(frame, at, to):
    """Frames that are almost right are refused or mean something else, and never crash."""
    payload = bytearray(encode(frame)[PREFIX_BYTES:])
    payload[at % len(payload)] = to
    with contextlib.suppress(RemoteProtocolError):
        decode(bytes(payload))


@given(stream=st.integers(1, 2**31 - 1), channel=st.integers(0, 255), data=st.binary(min_size=1, max_size=70))
def test_a_data_header_and_its_payload_are_a_data_frame(stream, channel, data):
    """The fast way to write DATA says the same as the ordinary one."""
    written = encode_data_header(stream, channel, len(data)) + data
    assert decode(written[PREFIX_BYTES:]) == Data(stream, channel, data)
    assert int.from_bytes(written[:PREFIX_BYTES], "big") == len(written) - PREFIX_BYTES


def nested(levels: int) -> dict:
    body: dict = {}
    for _ in range(levels - 1):
        body = {"k": body}
    return body


@pytest.mark.parametrize(
    "frame",
    [
        Open(1, "", {}, 0),
        Open(1, "m" * 65, {}, 0),
        Open(1, "m", {}, 2**31),
        Open(1, "m", {}, -1),
        Open(1, "m", nested(17), 0),
        Open(1, "m", {"k": {1: "int key"}}, 0),
        Open(1, "m", {"k": dt.datetime.now(dt.UTC)}, 0),
        Open(1, "m", {"k": object()}, 0),
        Open(1, "m", {"k": 2**64}, 0),
        Open(1, "m", {"k": "\ud800"}, 0),
        Reply(1, None),  # type: ignore[arg-type]
        Reply(1, ["not a map"]),  # type: ignore[arg-type]
        Failure(1, "c" * 65, "m", False, {}),
        Failure(1, "c", "m" * 4097, False, {}),
        Failure(1, "c", "m", False, {"k": msgspec.msgpack.Ext(1, b"")}),
        Credit(1, 0),
        Data(1, 256, b"x"),
        Data(1, 0, b""),
        Goaway("", "m"),
        Hello(1, ["f"] * 33, 0, 0),
    ],
    ids=lambda frame: repr(frame)[:60],
)
def test_what_the_peer_would_refuse_does_not_leave(frame):
    """A bad value is our caller's error: were it sent, the peer would close the connection on everybody."""
    with pytest.raises(LocalProtocolError):
        encode(frame)


def test_a_frame_that_is_too_large_says_so():
    """The one refusal a caller can do something about has a type of its own."""
    with pytest.raises(FrameTooLargeError, match="at most"):
        encode(Reply(1, {"k": b"x" * MAX_FRAME_BYTES}))


@pytest.mark.parametrize("element", [b"\xc0", b"\x90", b"\x80", b"\x01", b"\xa0", b"\x91\x90", b"\x81\xa0\x80"])
def test_a_body_of_very_many_values_is_affordable(element):
    """256 KiB of the smallest values, as a guest may send them: bounded memory, and no Python call for each value."""
    count = 256 * 1024 // len(element)
    payload = b"\x93\x04\x01\x81\xa1k\xdd" + count.to_bytes(4, "big") + element * count
    tracemalloc.start()
    try:
        frame = decode(payload)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(frame.body["k"]) == count
    assert peak < 160 * len(payload)
    calls = []
    gc.disable()  # its callbacks, Hypothesis has some, are calls as well
    sys.setprofile(lambda _frame, event, _argument: calls.append(event) if event == "call" else None)
    try:
        decode(payload)
    finally:
        sys.setprofile(None)
        gc.enable()
    assert len(calls) < 100


@settings(max_examples=30)
@given(depth=st.integers(1, 40), kind=st.sampled_from(["map", "list"]))
def test_depth_is_counted_the_same_for_maps_and_lists(depth, kind):
    """A body may have 16 levels, itself included, whatever they are made of."""
    inner: object = 1
    for _ in range(depth - 1):
        inner = {"k": inner} if kind == "map" else [inner]
    payload = pack([4, 1, {"k": inner}])
    if depth <= 16:
        assert decode(payload).body == {"k": inner}
    else:
        with pytest.raises(RemoteProtocolError, match="levels"):
            decode(payload)
