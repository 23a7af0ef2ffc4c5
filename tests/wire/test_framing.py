"""Frames out of a byte stream: any split is the same stream, and what is held stays small."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.wire.faults import RemoteProtocolError
from agent.wire.framing import PREFIX_BYTES, FrameBuffer
from agent.wire.limits import MAX_FRAME_BYTES


def prefixed(payload: bytes) -> bytes:
    return len(payload).to_bytes(PREFIX_BYTES, "big") + payload


def drain(buffer: FrameBuffer) -> list[bytes]:
    frames = []
    while (frame := buffer.next_frame()) is not None:
        frames.append(frame)
    return frames


@given(payloads=st.lists(st.binary(min_size=1, max_size=300), max_size=20), data=st.data())
def test_any_split_gives_the_same_frames(payloads, data):
    """However the bytes are cut, the frames are the payloads, in order, and nothing is left."""
    stream = b"".join(map(prefixed, payloads))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    buffer, got = FrameBuffer(), []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        buffer.feed(stream[begin:end])
        got += drain(buffer)
    assert got == payloads
    assert len(buffer) == 0


def test_one_byte_at_a_time():
    """The worst split of all."""
    buffer, got = FrameBuffer(), []
    for byte in prefixed(b"hello") + prefixed(b"x"):
        buffer.feed(bytes([byte]))
        got += drain(buffer)
    assert got == [b"hello", b"x"]


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**31, 2**32 - 1])
def test_a_length_out_of_range_is_refused_before_its_bytes_come(length):
    """The prefix alone is enough to give up."""
    buffer = FrameBuffer()
    buffer.feed(length.to_bytes(PREFIX_BYTES, "big"))
    with pytest.raises(RemoteProtocolError, match=str(length)):
        buffer.next_frame()


def test_a_frame_that_never_ends_holds_one_frame():
    """A peer that announces the largest frame and drips it makes us hold its bytes and no more."""
    buffer = FrameBuffer()
    buffer.feed(MAX_FRAME_BYTES.to_bytes(PREFIX_BYTES, "big"))
    for _ in range(MAX_FRAME_BYTES // 4096 - 1):
        buffer.feed(b"x" * 4096)
        assert buffer.next_frame() is None
    assert len(buffer) < MAX_FRAME_BYTES + PREFIX_BYTES


def test_memory_does_not_grow_with_what_has_passed():
    """64 MiB of frames that never end on a feed's boundary leave a buffer of a few hundred KiB at most."""
    chunk = prefixed(b"x" * 65_000)
    buffer = FrameBuffer()
    buffer.feed(chunk[:100])
    stream = (chunk[100:] + chunk[:100]) * 4
    tracemalloc.start()
    try:
        for _ in range(250):
            buffer.feed(stream)
            while buffer.next_frame() is not None:
                pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 1024 * 1024
    assert len(buffer) == 100
