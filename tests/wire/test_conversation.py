"""Both ends fed the same random legal conversation, over pipes that deliver any prefix at any time, never disagree."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.wire import limits
from agent.wire.link import Link, LinkState, Role
from agent.wire.messages import Cancel, Data, End, Failure, Frame, Open, Reply
from agent.wire.streams import StreamState

picks = st.integers(0, 10**6)


class Side:
    """One end of the conversation: its link, the pipe towards it, and what its application knows."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.pipe = bytearray()
        self.live: list[int] = []
        self.received: dict[int, bytes] = {}
        self.sent: dict[int, bytes] = {}
        self.unread: Counter[int] = Counter()


class Conversation(RuleBasedStateMachine):
    """Only legal actions are taken, so every exception is a bug; the model keeps its own, simpler books."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.finals: Counter[int] = Counter()
        self.opened: list[int] = []
        self.cancelled: set[int] = set()
        self.ended: set[int] = set()
        self.asked_to_stop: set[int] = set()

    @initialize(
        credit=st.sampled_from([0, 100, limits.INITIAL_CREDIT]), max_streams=st.integers(1, 4), at_once=st.booleans()
    )
    def connect(self, credit: int, max_streams: int, *, at_once: bool) -> None:
        self.opener = Side(Link(Role.OPENER, now=0.0, initial_credit=credit))
        self.server = Side(Link(Role.SERVER, now=0.0, initial_credit=credit, max_streams=max_streams))
        self.initial_credit = credit
        self.max_streams = max_streams
        self.collect()
        if at_once:
            self.deliver_everything()

    def collect(self) -> None:
        """Put what both links queued into the pipes."""
        self.server.pipe += self.opener.link.data_to_send()
        self.opener.pipe += self.server.link.data_to_send()

    # --- the pipes -------------------------------------------------------------------------------------------------

    @rule(to_server=st.booleans(), share=st.floats(0, 1))
    def deliver(self, to_server: bool, share: float) -> None:
        """Any prefix of one pipe arrives."""
        end = self.server if to_server else self.opener
        amount = round(len(end.pipe) * share)
        data = bytes(end.pipe[:amount])
        del end.pipe[:amount]
        for frame in end.link.receive_data(data, self.now):
            self.act_on(end, frame)
        self.collect()

    @rule()
    def deliver_everything(self) -> None:
        """Both pipes run empty."""
        while self.server.pipe or self.opener.pipe:
            self.deliver(to_server=True, share=1.0)
            self.deliver(to_server=False, share=1.0)

    def act_on(self, end: Side, frame: Frame) -> None:
        match frame:
            case Open(stream=number):
                end.live.append(number)
            case Data(stream=number, data=data):
                end.received[number] = end.received.get(number, b"") + data
                end.unread[number] += len(data)
            case End(stream=number):
                assert number in self.ended
            case Cancel(stream=number):
                assert number in self.cancelled
                self.asked_to_stop.add(number)
            case Reply(stream=number) | Failure(stream=number):
                self.finals[number] += 1
                end.live.remove(number)

    # --- the opener's application ----------------------------------------------------------------------------------

    @precondition(lambda self: self.opener.link.state is LinkState.READY)
    @rule(timeout_ms=st.integers(0, 1000))
    def open(self, timeout_ms: int) -> None:
        if len(self.opener.live) < self.max_streams:
            number = self.opener.link.open_stream("m", {"n": timeout_ms}, timeout_ms=timeout_ms)
            assert number not in self.opened
            self.opened.append(number)
            self.opener.live.append(number)
            self.collect()

    @precondition(lambda self: self.opener.live)
    @rule(pick=picks, what=st.sampled_from(["end", "cancel"]))
    def end_or_cancel(self, pick: int, what: str) -> None:
        number = self.opener.live[pick % len(self.opener.live)]
        if number in self.cancelled or (what == "end" and number in self.ended):
            return
        if what == "end":
            self.opener.link.send_end(number)
            self.ended.add(number)
        else:
            self.opener.link.cancel(number)
            self.cancelled.add(number)
        self.collect()

    # --- both applications -----------------------------------------------------------------------------------------

    @rule(from_opener=st.booleans(), pick=picks, size=st.integers(1, limits.MAX_DATA_BYTES), channel=st.integers(0, 3))
    def send(self, from_opener: bool, pick: int, size: int, channel: int) -> None:
        end = self.opener if from_opener else self.server
        sendable = [n for n in end.live if not (from_opener and n in self.cancelled | self.ended)]
        if not sendable:
            return
        number = sendable[pick % len(sendable)]
        size = min(size, end.link.send_credit(number))
        if size:
            data = bytes([len(end.sent.get(number, b"")) % 251]) * size
            end.link.send_data(number, channel, data)
            end.sent[number] = end.sent.get(number, b"") + data
            self.collect()

    @rule(at_opener=st.booleans(), pick=picks)
    def read_and_grant(self, at_opener: bool, pick: int) -> None:
        """The application consumes what came and says so; the opener not after CANCEL."""
        end = self.opener if at_opener else self.server
        numbers = [n for n in end.live if end.unread[n] and not (at_opener and n in self.cancelled)]
        if numbers:
            number = numbers[pick % len(numbers)]
            end.link.grant(number, end.unread.pop(number))
            self.collect()

    @precondition(lambda self: self.server.live)
    @rule(pick=picks, well=st.booleans(), patience=st.integers(0, 2))
    def answer(self, pick: int, well: bool, patience: int) -> None:
        """Not at every opportunity, or no stream would live long enough to be granted credit."""
        if patience:
            return
        number = self.server.live.pop(pick % len(self.server.live))
        if well:
            self.server.link.reply(number, {"n": number})
        else:
            self.server.link.fail(Failure(number, "internal", "", False, {}))
        self.collect()

    @precondition(lambda self: len(self.opened) > 6)
    @rule(by_server=st.booleans())
    def goaway(self, by_server: bool) -> None:
        end = self.server if by_server else self.opener
        if end.link.peer_hello is not None:
            end.link.goaway("draining", "")
            self.collect()

    @rule(seconds=st.floats(0, 9))
    def time_passes(self, seconds: float) -> None:
        """Pipes deliver within PING_TIMEOUT in this world: time passes, and then both pipes run empty."""
        self.now += seconds
        for end in (self.opener, self.server):
            if end.link.state is not LinkState.HELLO or self.now < limits.HELLO_TIMEOUT:
                end.link.handle_timer(self.now)
        self.collect()
        self.deliver_everything()

    # --- what must always hold -------------------------------------------------------------------------------------

    @invariant()
    def each_stream_has_one_last_frame(self) -> None:
        assert all(count == 1 for count in self.finals.values())
        assert set(self.finals) <= set(self.opened)
        assert sorted([*self.finals, *self.opener.live]) == self.opened

    @invariant()
    def ids_are_retired(self) -> None:
        assert self.opener.link.open_streams() == len(self.opener.live) <= self.max_streams
        assert self.server.link.open_streams() == len(self.server.live) <= self.max_streams

    @invariant()
    def bytes_arrive_in_order(self) -> None:
        for sender, receiver in ((self.opener, self.server), (self.server, self.opener)):
            for number, data in receiver.received.items():
                assert sender.sent[number].startswith(data)

    @invariant()
    def credit_is_never_negative_and_never_more_than_granted(self) -> None:
        for ours, theirs in ((self.opener, self.server), (self.server, self.opener)):
            for number, book in ours.link._streams.items():
                other = theirs.link._streams.get(number)
                assert book.send_credit >= 0
                assert other is None or book.send_credit <= other.receive_credit

    @invariant()
    def books_agree_when_nothing_is_under_way(self) -> None:
        if self.opener.pipe or self.server.pipe:
            return
        assert self.opener.link.state is not LinkState.CLOSED
        assert set(self.opener.link._streams) == set(self.server.link._streams)
        for number, ours in self.opener.link._streams.items():
            theirs = self.server.link._streams[number]
            assert (ours.send_credit, ours.receive_credit) == (theirs.receive_credit, theirs.send_credit)
            assert ours.state is theirs.state is not StreamState.DONE
            assert self.server.received.get(number, b"") == self.opener.sent.get(number, b"")
            assert self.opener.received.get(number, b"") == self.server.sent.get(number, b"")
        assert self.asked_to_stop >= {n for n in self.cancelled if n in self.opener.live}


TestConversation = Conversation.TestCase
TestConversation.settings = settings(
    max_examples=150, stateful_step_count=100, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
