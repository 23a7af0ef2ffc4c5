"""The state tables: what they list happens, what they do not list is refused and changes nothing."""

from __future__ import annotations

import copy
import itertools

import pytest

from agent.wire import link, streams
from agent.wire.codec import encode
from agent.wire.faults import LocalProtocolError, RemoteProtocolError
from agent.wire.link import Link, LinkEvent, LinkState, Role
from agent.wire.messages import Goaway, Hello, Ping
from agent.wire.streams import StreamBook, StreamEvent, StreamRuleBroken, StreamState

HELLO = Hello(1, [], 1000, 4)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(StreamState, StreamEvent)))
def test_stream_table(state, event):
    """Every pair of the stream's table, listed or not."""
    book = StreamBook(10, 20, state)
    before = copy.copy(book)
    after = streams.TRANSITIONS.get((state, event))
    if after is None:
        with pytest.raises(StreamRuleBroken, match=event.name):
            book.apply(event)
        assert book == before
    else:
        book.apply(event)
        assert book.state is after


def test_stream_table_says_what_the_document_says():
    """Written out once more by hand: a table is only as good as the check that it is the intended one."""
    up, down = StreamEvent.DATA_UP, StreamEvent.DATA_DOWN
    allowed = {state: {e for s, e in streams.TRANSITIONS if s is state} for state in StreamState}
    always = {down, StreamEvent.CREDIT_DOWN, StreamEvent.FINAL}
    assert allowed[StreamState.OPEN] == always | {up, StreamEvent.END, StreamEvent.CANCEL, StreamEvent.CREDIT_UP}
    assert allowed[StreamState.ENDED] == always | {StreamEvent.CANCEL, StreamEvent.CREDIT_UP}
    assert allowed[StreamState.CANCELLED] == always
    assert allowed[StreamState.DONE] == set()


@pytest.mark.parametrize("amount", [0, -1, 21])
def test_credit_that_is_not_there_changes_nothing(amount):
    """Spending more than there is, and granting nothing, leave the book as it was."""
    book = StreamBook(20, 20)
    if amount > 0:
        with pytest.raises(StreamRuleBroken):
            book.spend_send(amount)
        with pytest.raises(StreamRuleBroken):
            book.spend_receive(amount)
    else:
        with pytest.raises(StreamRuleBroken):
            book.earn_receive(amount)
    assert book == StreamBook(20, 20)


def in_state(state: LinkState) -> Link:
    """An opener's link that got into `state` by what its peer sent."""
    made = Link(Role.OPENER, now=0.0)
    if state is not LinkState.HELLO:
        made.receive_data(encode(HELLO), 0.0)
    if state is LinkState.DRAINING:
        made.receive_data(encode(Goaway("draining", "")), 0.0)
    if state is LinkState.CLOSED:
        made.close()
    assert made.state is state
    return made


@pytest.mark.parametrize(("state", "event"), list(itertools.product(LinkState, LinkEvent)))
def test_link_table(state, event):
    """Every pair of the link's table, driven by real frames: unlisted ones close the link as the peer's fault."""
    made = in_state(state)
    if event is LinkEvent.CLOSE:
        made.close()
        assert made.state is LinkState.CLOSED
        return
    frame = {LinkEvent.HELLO: HELLO, LinkEvent.FRAME: Ping(1), LinkEvent.GOAWAY: Goaway("draining", "")}[event]
    after = link.TRANSITIONS.get((state, event))
    if after is None:
        with pytest.raises(RemoteProtocolError):
            made.receive_data(encode(frame), 0.0)
        assert made.state is LinkState.CLOSED
    else:
        made.receive_data(encode(frame), 0.0)
        assert made.state is after


def snapshot(made: Link) -> tuple:
    return made.state, made.bytes_to_send, made.open_streams(), copy.deepcopy(made._streams), made._last_id


def test_a_rule_we_break_changes_nothing(ready_pair, pump):
    """Each misuse of our own end raises LocalProtocolError and leaves state, credit and output as they were."""
    opener, server = ready_pair(initial_credit=1000)
    done, ended, live = (opener.open_stream("m", {}) for _ in range(3))
    opener.send_end(ended)
    pump(opener, server)
    server.reply(done, {})
    pump(server, opener)
    for act in (
        lambda: opener.open_stream("", {}),
        lambda: opener.open_stream("m", {"k": object()}),
        lambda: opener.open_stream("m", {}, timeout_ms=2**31),
        lambda: opener.send_data(done, 0, b"x"),
        lambda: opener.send_data(ended, 0, b"x"),
        lambda: opener.send_data(live, 0, b""),
        lambda: opener.send_data(live, 256, b"x"),
        lambda: opener.send_data(live, -1, b"x"),
        lambda: opener.send_data(live, 0, b"x" * 1001),
        lambda: opener.send_end(ended),
        lambda: opener.send_end(99),
        lambda: opener.cancel(done),
        lambda: opener.grant(live, 0),
        lambda: opener.grant(live, 2**24),
        lambda: opener.grant(done, 1),
        lambda: opener.reply(live, {}),
        lambda: opener.goaway("", ""),
    ):
        before = snapshot(opener)
        with pytest.raises(LocalProtocolError):
            act()
        assert snapshot(opener) == before
    for act in (
        lambda: server.open_stream("m", {}),
        lambda: server.send_end(live),
        lambda: server.cancel(live),
        lambda: server.reply(done, {}),
        lambda: server.reply(live, {"k": object()}),
        lambda: server.send_data(done, 0, b"x"),
    ):
        before = snapshot(server)
        with pytest.raises(LocalProtocolError):
            act()
        assert snapshot(server) == before
