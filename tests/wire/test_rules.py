"""docs/protocol.md's rules, one by one, on a pair of links joined by hand; and each limit just below and just above."""

from __future__ import annotations

import msgspec
import pytest

from agent.wire import limits
from agent.wire.codec import encode
from agent.wire.faults import LocalProtocolError, RemoteProtocolError
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

HELLO = Hello(limits.VERSION, [], limits.INITIAL_CREDIT, limits.MAX_STREAMS)


def link(role: Role, *frames: Frame, **options: int) -> Link:
    """A link to which the peer has sent HELLO and `frames`."""
    made = Link(role, now=0.0, **options)
    made.data_to_send()
    feed(made, HELLO, *frames)
    return made


def feed(made: Link, *frames: Frame) -> list[Frame]:
    return made.receive_data(b"".join(map(encode, frames)), 0.0)


def refuses(made: Link, *frames: Frame, because: str | None = None) -> None:
    """The last of `frames` ends the connection, none before it does."""
    feed(made, *frames[:-1])
    with pytest.raises(RemoteProtocolError, match=because):
        feed(made, frames[-1])
    assert made.state is LinkState.CLOSED
    with pytest.raises(RemoteProtocolError, match="closed"):
        made.receive_data(b"", 0.0)


# --- rule 1: HELLO first, once, of our version ---------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
def test_hello_leaves_before_the_other_is_read(role):
    """Both sides send HELLO at once, so neither waits for the other."""
    made = Link(role, now=0.0, features=["f"])
    data = made.data_to_send()
    served = limits.MAX_STREAMS if role is Role.SERVER else 0
    assert data == encode(Hello(limits.VERSION, ["f"], limits.INITIAL_CREDIT, served))


@pytest.mark.parametrize("frame", [Open(1, "m", {}, 0), Ping(1), Goaway("c", ""), Reply(1, {})])
def test_anything_before_hello_ends_it(frame):
    """The first frame is HELLO or nothing."""
    refuses(Link(Role.SERVER, now=0.0), frame, because="HELLO")


def test_a_second_hello_ends_it():
    """HELLO comes once."""
    refuses(link(Role.SERVER), HELLO)


@pytest.mark.parametrize("version", [limits.VERSION - 1, limits.VERSION + 1])
def test_another_version_ends_it(version):
    """VERSION: the one below and the one above are refused."""
    refuses(Link(Role.SERVER, now=0.0), Hello(version, [], 0, 0), because=f"version {version}")


def test_nothing_is_opened_before_the_peers_hello():
    """The opener does not know the server's limits yet."""
    made = Link(Role.OPENER, now=0.0)
    with pytest.raises(LocalProtocolError):
        made.open_stream("m", {})


# --- rule 2: ids grow; no more streams at once than the server serves ----------------------------------------------


@pytest.mark.parametrize("second", [5, 4, 1])
def test_an_id_that_does_not_grow_ends_it(second):
    """An OPEN with an id seen before, or below one seen before."""
    refuses(link(Role.SERVER), Open(5, "m", {}, 0), Open(second, "m", {}, 0), because="stream id")


def test_ids_may_skip():
    """Growing is enough."""
    assert len(feed(link(Role.SERVER), Open(3, "m", {}, 0), Open(90, "m", {}, 0))) == 2


def test_max_streams_at_the_server():
    """MAX_STREAMS: the last one is served, one more ends the connection, one that was answered makes room."""
    made = link(Role.SERVER)
    feed(made, *(Open(number, "m", {}, 0) for number in range(1, limits.MAX_STREAMS + 1)))
    assert made.open_streams() == limits.MAX_STREAMS
    made.reply(7, {})
    feed(made, Open(limits.MAX_STREAMS + 1, "m", {}, 0))
    refuses(made, Open(limits.MAX_STREAMS + 2, "m", {}, 0), because="streams at once")


def test_max_streams_at_the_opener():
    """MAX_STREAMS: the opener refuses the one too many before it reaches the wire."""
    made = link(Role.OPENER)
    for _ in range(limits.MAX_STREAMS):
        made.open_stream("m", {})
    with pytest.raises(LocalProtocolError, match="room"):
        made.open_stream("m", {})
    feed(made, Reply(1, {}))
    assert made.open_stream("m", {}) == limits.MAX_STREAMS + 1


def test_max_stream_id():
    """MAX_STREAM_ID: the last id is used, the one after it is not, on either side."""
    made = link(Role.OPENER)
    made._last_id = limits.MAX_STREAM_ID - 1
    assert not made.ids_used_up()
    assert made.open_stream("m", {}) == limits.MAX_STREAM_ID
    assert made.ids_used_up()
    with pytest.raises(LocalProtocolError):
        made.open_stream("m", {})
    server = link(Role.SERVER)
    assert feed(server, Open(limits.MAX_STREAM_ID, "m", {}, 0))
    over = b"\x95\x01\xce\x80\x00\x00\x00\xa1m\x80\x00"
    with pytest.raises(RemoteProtocolError):
        server.receive_data(len(over).to_bytes(4, "big") + over, 0.0)


# --- rule 3: one last frame, also after CANCEL ----------------------------------------------------------------------


def test_cancel_still_waits_for_the_last_frame(ready_pair, pump):
    """CANCEL does not retire the id; the FAULT after it does, on both ends, and both then refuse more."""
    opener, server = ready_pair()
    number = opener.open_stream("m", {})
    opener.cancel(number)
    assert pump(opener, server) == [Open(number, "m", {}, 0), Cancel(number)]
    assert opener.has_stream(number)
    assert server.has_stream(number)
    server.fail(Failure(number, "cancelled", "", False, {}))
    with pytest.raises(LocalProtocolError):
        server.reply(number, {})
    pump(server, opener)
    assert not opener.has_stream(number)
    assert opener.send_credit(number) == 0


def test_a_second_last_frame_ends_it():
    """A server that answers twice."""
    made = link(Role.OPENER)
    number = made.open_stream("m", {})
    refuses(made, Reply(number, {}), Reply(number, {}), because="not open")


# --- rule 4: credit -------------------------------------------------------------------------------------------------


def chunks(number: int, total: int) -> list[Frame]:
    sizes = [limits.MAX_DATA_BYTES] * (total // limits.MAX_DATA_BYTES)
    rest = total % limits.MAX_DATA_BYTES
    return [Data(number, 0, b"x" * size) for size in ([*sizes, rest] if rest else sizes)]


@pytest.mark.parametrize("role", Role)
def test_initial_credit(role):
    """INITIAL_CREDIT: every byte of it may come, one more ends the connection. In both directions."""
    made = link(role)
    if role is Role.OPENER:
        made.open_stream("m", {})
    else:
        feed(made, Open(1, "m", {}, 0))
    refuses(made, *chunks(1, limits.INITIAL_CREDIT), Data(1, 0, b"x"), because="credit")


def test_our_own_sending_stays_within_credit(ready_pair, pump):
    """A sender cannot overdraw, and a CREDIT lets it go on by exactly that much."""
    opener, server = ready_pair(initial_credit=10)
    number = opener.open_stream("m", {})
    opener.send_data(number, 0, b"x" * 10)
    with pytest.raises(LocalProtocolError, match="credit"):
        opener.send_data(number, 0, b"x")
    pump(opener, server)
    server.grant(number, 3)
    pump(server, opener)
    assert opener.send_credit(number) == 3
    opener.send_data(number, 0, b"xyz")
    pump(opener, server)
    assert server._streams[number].receive_credit == 0


def test_max_credit():
    """MAX_CREDIT: a stream can hold it, and not one byte more."""
    made = link(Role.OPENER)
    number = made.open_stream("m", {})
    room = limits.MAX_CREDIT - limits.INITIAL_CREDIT
    feed(made, Credit(number, room))
    assert made.send_credit(number) == limits.MAX_CREDIT
    refuses(made, Credit(number, 1), because="credit beyond")
    ours = link(Role.OPENER)
    number = ours.open_stream("m", {})
    ours.grant(number, room)
    with pytest.raises(LocalProtocolError):
        ours.grant(number, 1)


def test_max_credit_in_one_frame():
    """MAX_CREDIT: the field itself ends there, in CREDIT and in HELLO."""
    assert encode(Credit(1, limits.MAX_CREDIT))
    assert encode(Hello(1, [], limits.MAX_CREDIT, 0))
    for frame in (Credit(1, limits.MAX_CREDIT + 1), Hello(1, [], limits.MAX_CREDIT + 1, 0)):
        with pytest.raises(LocalProtocolError):
            encode(frame)


def raw_data(*fields: int) -> bytes:
    """A DATA frame that `encode` would refuse."""
    stream, channel, length = fields
    payload = msgspec.msgpack.encode([2, stream, channel, b"x" * length])
    return len(payload).to_bytes(4, "big") + payload


def test_max_data_bytes():
    """MAX_DATA_BYTES: a chunk of it passes, both out and in; a byte more does neither."""
    made = link(Role.OPENER)
    number = made.open_stream("m", {})
    made.send_data(number, limits.MAX_CHANNEL, b"x" * limits.MAX_DATA_BYTES)
    with pytest.raises(LocalProtocolError):
        made.send_data(number, 0, b"x" * (limits.MAX_DATA_BYTES + 1))
    feed(made, Data(number, 0, b"x" * limits.MAX_DATA_BYTES))
    with pytest.raises(RemoteProtocolError):
        made.receive_data(raw_data(number, 0, limits.MAX_DATA_BYTES + 1), 0.0)


def test_max_channel():
    """MAX_CHANNEL: the last channel passes in, the next does not (out: test_a_rule_we_break_changes_nothing)."""
    made = link(Role.OPENER)
    number = made.open_stream("m", {})
    feed(made, Data(number, limits.MAX_CHANNEL, b"x"))
    with pytest.raises(RemoteProtocolError):
        made.receive_data(raw_data(number, limits.MAX_CHANNEL + 1, 1), 0.0)


def test_max_frame_bytes():
    """MAX_FRAME_BYTES: a frame of exactly that size makes the trip; one of a byte more is refused on both ends."""
    made = link(Role.OPENER)
    number = made.open_stream("m", {})
    empty = len(encode(Reply(number, {"k": b"x" * 70_000}))) - 4 - 70_000
    largest = Reply(number, {"k": b"x" * (limits.MAX_FRAME_BYTES - empty)})
    encoded = encode(largest)
    assert len(encoded) == 4 + limits.MAX_FRAME_BYTES
    assert made.receive_data(encoded, 0.0) == [largest]
    with pytest.raises(LocalProtocolError):
        encode(Reply(number, {"k": b"x" * (limits.MAX_FRAME_BYTES - empty + 1)}))
    with pytest.raises(RemoteProtocolError):
        made.receive_data((limits.MAX_FRAME_BYTES + 1).to_bytes(4, "big"), 0.0)


def test_a_link_may_take_smaller_frames_only():
    """`max_frame_bytes` narrows what a less trusted peer may send."""
    made = link(Role.OPENER, max_frame_bytes=1000)
    number = made.open_stream("m", {})
    refuses(made, Reply(number, {"k": b"x" * 1000}), because="1000")


@pytest.mark.parametrize(("features", "fits"), [(["f" * 64] * 32, True), (["f"] * 33, False), (["f" * 65], False)])
def test_max_features(features, fits):
    """MAX_FEATURES: 32 names of 64 characters, and not one more of either."""
    assert limits.MAX_FEATURES == 32
    if fits:
        assert Link(Role.SERVER, now=0.0, features=features).data_to_send()
    else:
        with pytest.raises(LocalProtocolError):
            Link(Role.SERVER, now=0.0, features=features)


# --- rule 5: late frames of retired streams -------------------------------------------------------------------------

LATE = [Data(1, 0, b"x"), End(1), Credit(1, 1), Cancel(1)]


@pytest.mark.parametrize("frame", LATE, ids=lambda frame: type(frame).__name__)
def test_late_frames_of_a_retired_stream_are_dropped(frame):
    """The opener may have sent these before it saw the answer: no event, no harm."""
    made = link(Role.SERVER, Open(1, "m", {}, 0))
    made.reply(1, {})
    assert feed(made, frame) == []
    assert made.state is LinkState.READY


@pytest.mark.parametrize("frame", LATE, ids=lambda frame: type(frame).__name__)
def test_frames_of_a_stream_never_opened_end_it(frame):
    """An id above all that were opened."""
    refuses(link(Role.SERVER), frame, because="not open")


@pytest.mark.parametrize("frame", [Data(1, 0, b"x"), Credit(1, 1), Reply(1, {}), Failure(1, "c", "", False, {})])
def test_the_server_has_no_late_frames(frame):
    """Its last frame is its last: whatever it sends after that ends the connection."""
    made = link(Role.OPENER)
    made.open_stream("m", {})
    refuses(made, Reply(1, {}), frame, because="not open")


def test_after_cancel_data_and_credit_still_come():
    """The server did not know yet."""
    made = link(Role.OPENER)
    number = made.open_stream("m", {})
    made.cancel(number)
    feed(made, Data(number, 0, b"x"), Credit(number, 1), Failure(number, "cancelled", "", False, {}))
    assert made.open_streams() == 0


# --- rules 6 to 8 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames",
    [
        (End(1), Data(1, 0, b"x")),
        (End(1), End(1)),
        (Cancel(1), Cancel(1)),
        (Cancel(1), End(1)),
        (Cancel(1), Data(1, 0, b"x")),
        (End(1), Cancel(1), End(1)),
    ],
    ids=lambda frames: "-".join(type(frame).__name__ for frame in frames),
)
def test_nothing_follows_end_or_cancel(frames):
    """DATA after END, END twice, CANCEL twice, anything but CREDIT after CANCEL."""
    refuses(link(Role.SERVER, Open(1, "m", {}, 0)), *frames)


@pytest.mark.parametrize(
    ("role", "frame"),
    [
        (Role.SERVER, Reply(1, {})),
        (Role.SERVER, Failure(1, "c", "", False, {})),
        (Role.OPENER, Open(1, "m", {}, 0)),
        (Role.OPENER, Open(9, "m", {}, 0)),
        (Role.OPENER, End(1)),
        (Role.OPENER, Cancel(1)),
    ],
)
def test_frames_of_the_other_role_end_it(role, frame):
    """Each side sends its own kinds only, also on a stream that is open."""
    made = link(role)
    if role is Role.OPENER:
        made.open_stream("m", {})
    else:
        feed(made, Open(1, "m", {}, 0))
    refuses(made, frame)


def test_a_ping_is_answered_once_and_not_queued_twice():
    """PING gets PONG; a second PING before that PONG was written is a flood and ends the connection."""
    made = link(Role.SERVER)
    feed(made, Ping(7))
    assert made.data_to_send() == encode(Pong(7))
    feed(made, Ping(8))
    refuses(made, Ping(9), because="PING")


def test_a_pong_nobody_asked_for_ends_it():
    """Neither without a PING, nor with another nonce, nor twice."""
    refuses(link(Role.SERVER), Pong(0), because="PONG")
    made = link(Role.SERVER)
    made.handle_timer(limits.PING_INTERVAL)
    refuses(made, Pong(2), because="PONG")
    made = link(Role.SERVER)
    made.handle_timer(limits.PING_INTERVAL)
    refuses(made, Pong(1), Pong(1), because="PONG")


def test_goaway_stops_new_streams_and_no_old_ones(ready_pair, pump):
    """After the server's GOAWAY the opener opens nothing; the server still takes an OPEN that was on its way."""
    opener, server = ready_pair()
    first = opener.open_stream("m", {})
    pump(opener, server)
    server.goaway("draining", "bye")
    crossing = opener.open_stream("m", {})
    assert pump(server, opener) == [Goaway("draining", "bye")]
    assert opener.state is server.state is LinkState.DRAINING
    with pytest.raises(LocalProtocolError, match="DRAINING"):
        opener.open_stream("m", {})
    assert pump(opener, server) == [Open(crossing, "m", {}, 0)]
    server.fail(Failure(crossing, "draining", "", True, {}))
    server.reply(first, {})
    assert len(pump(server, opener)) == 2


def test_the_deadline_travels(ready_pair, pump):
    """Rule 9: the server sees `timeout_ms` as the opener gave it."""
    opener, server = ready_pair()
    opener.open_stream("m", {"k": "v"}, timeout_ms=1234)
    assert pump(opener, server) == [Open(1, "m", {"k": "v"}, 1234)]


def test_output_is_counted():
    """`bytes_to_send` is what `data_to_send` will give, and nothing afterwards."""
    made = link(Role.OPENER)
    made.open_stream("m", {"k": "v" * 100})
    made.cancel(1)
    announced = made.bytes_to_send
    assert len(made.data_to_send()) == announced > 100
    assert made.bytes_to_send == 0
    assert made.data_to_send() == b""


# --- time -----------------------------------------------------------------------------------------------------------


def test_hello_timeout():
    """HELLO_TIMEOUT: at it the peer is given up, just before it not; bytes that are no HELLO buy no time."""
    made = Link(Role.SERVER, now=100.0)
    assert made.next_timer() == 100.0 + limits.HELLO_TIMEOUT
    for second in range(10):
        made.receive_data(b"\x00" if second == 0 else b"", 100.0 + second)
    made.handle_timer(100.0 + limits.HELLO_TIMEOUT - 0.001)
    with pytest.raises(RemoteProtocolError, match="silent"):
        made.handle_timer(100.0 + limits.HELLO_TIMEOUT)
    assert made.state is LinkState.CLOSED


def test_ping_interval_and_timeout():
    """PING_INTERVAL of silence asks, PING_TIMEOUT without PONG gives up; just before either nothing happens."""
    made = link(Role.OPENER)
    made.data_to_send()
    assert made.next_timer() == limits.PING_INTERVAL
    made.handle_timer(limits.PING_INTERVAL - 0.001)
    assert made.bytes_to_send == 0
    made.handle_timer(limits.PING_INTERVAL)
    assert made.data_to_send() == encode(Ping(1))
    asked = limits.PING_INTERVAL
    assert made.next_timer() == asked + limits.PING_TIMEOUT
    made.handle_timer(asked + limits.PING_TIMEOUT - 0.001)
    assert made.bytes_to_send == 0
    with pytest.raises(RemoteProtocolError, match="silent"):
        made.handle_timer(asked + limits.PING_TIMEOUT)


def test_a_pong_in_time_starts_over():
    """An answered PING is forgotten; the next silence asks again, with another nonce."""
    made = link(Role.OPENER)
    made.handle_timer(10.0)
    made.data_to_send()
    made.receive_data(encode(Pong(1)), 29.9)
    assert made.next_timer() == 29.9 + limits.PING_INTERVAL
    made.handle_timer(39.9)
    assert made.data_to_send() == encode(Ping(2))


def test_a_peer_that_talks_but_never_answers_is_given_up():
    """Traffic does not stand in for the PONG."""
    made = link(Role.OPENER)
    made.handle_timer(10.0)
    made.receive_data(encode(Goaway("c", "")), 29.0)
    with pytest.raises(RemoteProtocolError, match="silent"):
        made.handle_timer(30.0)


def test_a_peer_that_talks_is_not_asked():
    """Any byte counts as a sign of life."""
    made = link(Role.OPENER)
    made.data_to_send()
    made.receive_data(encode(Goaway("c", "")), 9.0)
    made.handle_timer(10.0)
    assert made.bytes_to_send == 0
    assert made.next_timer() == 9.0 + limits.PING_INTERVAL
