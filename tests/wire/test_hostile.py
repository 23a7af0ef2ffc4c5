"""A peer that does anything at all: RemoteProtocolError, bounded memory, and never another exception."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.wire import limits
from agent.wire.codec import encode
from agent.wire.faults import RemoteProtocolError
from agent.wire.link import Link, LinkState, Role
from agent.wire.messages import (
    Cancel,
    Credit,
    Data,
    End,
    Failure,
    Frame,
    Goaway,
    Hello,
    Open,
    Ping,
    Pong,
    Reply,
)

HELLO = encode(Hello(limits.VERSION, [], limits.INITIAL_CREDIT, limits.MAX_STREAMS))
roles = st.sampled_from(Role)

few_ids = st.integers(1, 4)
near_frames = st.one_of(
    st.builds(Open, few_ids, st.just("m"), st.just({}), st.just(0)),
    st.builds(Data, few_ids, st.integers(0, 3), st.binary(min_size=1, max_size=9)),
    st.builds(End, few_ids),
    st.builds(Reply, few_ids, st.just({})),
    st.builds(Failure, few_ids, st.just("c"), st.just(""), st.booleans(), st.just({})),
    st.builds(Credit, few_ids, st.sampled_from([1, limits.MAX_CREDIT])),
    st.builds(Cancel, few_ids),
    st.builds(Ping, st.just(1)),
    st.builds(Pong, st.just(1)),
    st.builds(Goaway, st.just("c"), st.just("")),
)
"""Few ids and values, so that frames meet each other's streams."""


def started(role: Role) -> Link:
    """A link past HELLO; an opener's has three streams in different states."""
    made = Link(role, now=0.0)
    made.receive_data(HELLO, 0.0)
    if role is Role.OPENER:
        for _ in range(3):
            made.open_stream("m", {})
        made.send_end(2)
        made.cancel(3)
    made.data_to_send()
    return made


def feed_in_pieces(made: Link, stream: bytes, cuts: list[int]) -> list[Frame]:
    """What came before the peer was caught, if it was; every other exception is the failure we look for."""
    events: list[Frame] = []
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    try:
        for begin, end in pairwise(edges):
            events += made.receive_data(stream[begin:end], 0.0)
            made.data_to_send()
    except RemoteProtocolError:
        assert made.state is LinkState.CLOSED
    return events


@given(role=roles, stream=st.binary(max_size=400), past_hello=st.booleans(), cuts=st.lists(st.integers(0, 400)))
def test_random_bytes(role, stream, past_hello, cuts):
    """Noise, before and after HELLO."""
    made = started(role) if past_hello else Link(role, now=0.0)
    feed_in_pieces(made, stream, cuts)
    assert len(made._buffer) <= len(stream)


@given(role=roles, frames=st.lists(st.one_of(*(st.from_type(kind) for kind in get_args(Frame))), max_size=20))
def test_well_formed_frames_in_any_order(role, frames):
    """Each frame is right by itself, the conversation is not."""
    feed_in_pieces(started(role), b"".join(map(encode, frames)), [])


@settings(max_examples=300)
@given(role=roles, frames=st.lists(near_frames, max_size=30), cuts=st.lists(st.integers(0, 10_000), max_size=5))
def test_frames_of_the_same_few_streams_in_any_order(role, frames, cuts):
    """Wrong order on streams that exist; what is delivered obeys the rules however the peer behaves."""
    made = started(role)
    events = feed_in_pieces(made, b"".join(map(encode, frames)), cuts)
    finals = [event.stream for event in events if isinstance(event, Reply | Failure)]
    opens = [event.stream for event in events if isinstance(event, Open)]
    assert len(finals) == len(set(finals))
    assert opens == sorted(set(opens))
    assert role is Role.SERVER or not opens
    assert role is Role.OPENER or not finals
    assert not any(isinstance(event, Ping | Pong | Hello) for event in events)


@settings(max_examples=300)
@given(data=st.data(), role=roles)
def test_a_valid_conversation_with_some_bytes_changed(data, role):
    """Flipped, dropped and repeated bytes in a conversation that was valid."""
    mine = st.builds(Open, few_ids, st.just("m"), st.just({"k": [1, "x"]}), st.just(0)) | near_frames
    stream = bytearray(b"".join(map(encode, data.draw(st.lists(mine, min_size=1, max_size=15)))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        match data.draw(st.sampled_from(["flip", "drop", "repeat"])):
            case "flip":
                stream[at] ^= data.draw(st.integers(1, 255))
            case "drop" if len(stream) > 1:
                del stream[at]
            case "repeat":
                stream[at:at] = stream[at : at + 8]
    feed_in_pieces(started(role), bytes(stream), [])


@settings(max_examples=200)
@given(role=roles, frames=st.lists(near_frames, max_size=30), cuts=st.lists(st.integers(0, 10_000), max_size=8))
def test_any_split_gives_the_same_end(role, frames, cuts):
    """A conversation is accepted or refused whatever the split; when accepted, its events are the same, too.

    PINGs are left out: a second one is a flood or not depending on whether its answer was written in between.
    """
    stream = b"".join(encode(frame) for frame in frames if not isinstance(frame, Ping))
    whole, cut = started(role), started(role)
    events, events_cut = feed_in_pieces(whole, stream, []), feed_in_pieces(cut, stream, cuts)
    assert whole.state is cut.state
    if whole.state is LinkState.CLOSED:
        assert events_cut[: len(events)] == events
    else:
        assert events_cut == events
        assert whole._streams == cut._streams


def peak_of(act) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_ping_flood_is_cut_off():
    """Two unanswered PINGs are enough; nothing piles up."""
    made = started(Role.SERVER)
    with pytest.raises(RemoteProtocolError, match="PING"):
        made.receive_data(encode(Ping(1)) * 10_000, 0.0)
    assert made.bytes_to_send < 100


def test_late_frames_for_ever_cost_nothing():
    """Rule 5 lets an opener send to retired streams as long as it likes: nothing is kept."""
    made = started(Role.SERVER)
    made.receive_data(encode(Open(1, "m", {}, 0)), 0.0)
    made.reply(1, {})
    made.data_to_send()
    flood = encode(Data(1, 0, b"x" * 60_000)) * 4

    def act() -> None:
        for _ in range(50):
            assert made.receive_data(flood, 0.0) == []

    assert peak_of(act) < 2 * 1024 * 1024
    assert len(made._buffer) == made.bytes_to_send == 0


def test_streams_for_ever_cost_nothing():
    """A hundred thousand streams, opened and answered, leave nothing behind."""
    made = started(Role.SERVER)

    def act() -> None:
        for number in range(1, 20_001):
            made.receive_data(encode(Open(number, "m", {}, 0)), 0.0)
            made.reply(number, {})
            made.data_to_send()

    assert peak_of(act) < 256 * 1024
    assert made.open_streams() == 0


def test_frames_that_never_end_are_held_once():
    """A peer drips the largest frame, a byte short of its end: no more than that frame is held."""
    made = started(Role.SERVER)
    length = limits.MAX_FRAME_BYTES

    def act() -> None:
        made.receive_data(length.to_bytes(4, "big"), 0.0)
        for _ in range(length // 8192 - 1):
            assert made.receive_data(b"\x00" * 8192, 0.0) == []

    assert peak_of(act) < 3 * length
    assert len(made._buffer) < length


def test_nothing_is_taken_from_a_closed_link():
    """After the verdict the peer's bytes are not even stored."""
    made = started(Role.SERVER)
    with pytest.raises(RemoteProtocolError):
        made.receive_data(b"\xff" * 8, 0.0)
    held = len(made._buffer)
    with pytest.raises(RemoteProtocolError, match="closed"):
        made.receive_data(b"x" * 1000, 0.0)
    assert len(made._buffer) == held
