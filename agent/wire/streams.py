"""One stream of a link: a state table shared by both ends, and credit in both directions.

Both ends drive the same table with the frames they send and receive, so neither can go easy on itself (after h11).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto

from agent.wire.limits import MAX_CREDIT


class StreamState(IntEnum):
    """Where a stream stands."""

    OPEN = auto()
    ENDED = auto()
    CANCELLED = auto()
    DONE = auto()


class StreamEvent(IntEnum):
    """What happens to a stream: UP is from opener to server, DOWN from server to opener."""

    DATA_UP = auto()
    END = auto()
    CANCEL = auto()
    CREDIT_UP = auto()
    DATA_DOWN = auto()
    CREDIT_DOWN = auto()
    FINAL = auto()


TRANSITIONS: dict[tuple[StreamState, StreamEvent], StreamState] = {
    (StreamState.OPEN, StreamEvent.DATA_UP): StreamState.OPEN,
    (StreamState.OPEN, StreamEvent.END): StreamState.ENDED,
    (StreamState.OPEN, StreamEvent.CANCEL): StreamState.CANCELLED,
    (StreamState.ENDED, StreamEvent.CANCEL): StreamState.CANCELLED,
    **{
        (state, event): state
        for state in (StreamState.OPEN, StreamState.ENDED, StreamState.CANCELLED)
        for event in (StreamEvent.DATA_DOWN, StreamEvent.CREDIT_DOWN)
    },
    **{(state, StreamEvent.CREDIT_UP): state for state in (StreamState.OPEN, StreamState.ENDED)},
    **{
        (state, StreamEvent.FINAL): StreamState.DONE
        for state in (StreamState.OPEN, StreamState.ENDED, StreamState.CANCELLED)
    },
}
"""A pair that is not listed is a broken rule and changes nothing."""


class StreamRuleBroken(Exception):  # noqa: N818 - turned into a Local- or RemoteProtocolError by the link
    """An event the table does not list, or credit misused."""


@dataclass(slots=True)
class StreamBook:
    """State and credit of one stream. `send_credit`: bytes we may send; `receive_credit`: bytes the peer may."""

    send_credit: int
    receive_credit: int
    state: StreamState = StreamState.OPEN

    def apply(self, event: StreamEvent) -> None:
        """Move along the table."""
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            raise StreamRuleBroken(f"{event.name} on a stream that is {self.state.name}")
        self.state = after

    def spend_send(self, amount: int) -> None:
        """We send `amount` bytes."""
        if amount > self.send_credit:
            raise StreamRuleBroken(f"{amount} bytes with a credit of {self.send_credit}")
        self.send_credit -= amount

    def spend_receive(self, amount: int) -> None:
        """The peer sent `amount` bytes."""
        if amount > self.receive_credit:
            raise StreamRuleBroken(f"{amount} bytes with a credit of {self.receive_credit}")
        self.receive_credit -= amount

    def earn_receive(self, amount: int) -> None:
        """We grant `amount` bytes. The peer has at most the credit we count, so what fits here fits there."""
        if not 0 < amount <= MAX_CREDIT - self.receive_credit:
            raise StreamRuleBroken(f"a grant of {amount} bytes on top of {self.receive_credit}")
        self.receive_credit += amount

    def earn_send(self, amount: int) -> None:
        """The peer granted `amount` bytes."""
        if self.send_credit + amount > MAX_CREDIT:
            raise StreamRuleBroken(f"credit beyond {MAX_CREDIT}")
        self.send_credit += amount
