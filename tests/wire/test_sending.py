"""The order in which frames leave: each stream's own is kept, control passes, nobody waits behind a flood."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.wire.sending import QUANTUM_BYTES, SendQueue

FULL = b"\x00" * (QUANTUM_BYTES - 20)


def frame(number):
    """Names its stream in two bytes, so that what is taken can be read again."""
    return number.to_bytes(2, "big")


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(1, 6), st.integers(0, 300)),
            st.tuples(st.just("take"), st.one_of(st.none(), st.integers(0, 2000))),
        ),
        max_size=80,
    )
)
def test_nothing_is_lost_or_reordered(steps):
    """Whatever is put in and taken: every stream's bytes come out in order, once; `bytes` counts them."""
    queue, put, taken = SendQueue(), {}, {}

    def take(limit):
        data = queue.take(limit)
        while data:
            number, length = data[0], int.from_bytes(data[1:3], "big")
            taken.setdefault(number, []).append(data[3 : 3 + length])
            data = data[3 + length :]

    for count, (what, size) in enumerate(steps):
        if what == "take":
            take(size)
        else:
            payload = bytes([count % 256]) * size
            put.setdefault(what, []).append(payload)
            queue.put(what, bytes([what]) + size.to_bytes(2, "big"), payload)
        left = sum(len(one) + 3 for all_of in put.values() for one in all_of)
        left -= sum(len(one) + 3 for all_of in taken.values() for one in all_of)
        assert queue.bytes == left
    take(None)
    assert taken == put
    assert queue.bytes == 0
    assert not any(queue.holds(number) for number in put)


def test_a_quiet_stream_passes_those_that_flood():
    """Hundreds of frames wait, of many streams: a new one's piece is in the next write, each time it says something."""
    queue = SendQueue()
    for number in range(100):
        for _ in range(8):
            queue.put(number, frame(number), FULL)
    for _ in range(50):
        queue.put(500, frame(500), b"key")
        assert frame(500) + b"key" in queue.take(2 * QUANTUM_BYTES)


def test_many_small_pieces_are_no_privilege():
    """A stream that is always empty and always back takes its turns like those that queue; so do floods among each
    other."""
    queue, sent = SendQueue(), {}
    for _ in range(2000):
        for number in (1, 2):
            while not queue.holds(number) or queue.bytes < 4 * QUANTUM_BYTES:
                queue.put(number, frame(number), FULL)
        while not queue.holds(3):
            queue.put(3, frame(3), b"s" * 8190)
        data = queue.take(8192)
        number = int.from_bytes(data[:2], "big")
        sent[number] = sent.get(number, 0) + len(data)
    assert min(sent[1], sent[2]) > 0.8 * max(sent[1], sent[2])
    assert sent[3] < 1.3 * sent[1]


def test_control_frames_pass_everything():
    """In their order; also when no byte more was asked for."""
    queue = SendQueue()
    queue.put(1, frame(1), FULL)
    queue.put_control(b"one")
    queue.put_control(b"two")
    assert queue.take(1) == b"onetwo"
    assert queue.take() == frame(1) + FULL
