"""The pool's books, driven in any order."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.net.ledger import LAST_BACKOFF_SECONDS, WORKERS, SlotLedger

NUMBERS = range(3, 9)


class LedgerMachine(RuleBasedStateMachine):
    """Random histories; a model knows which numbers are held, at work, and when each was freed last."""

    def __init__(self):
        super().__init__()
        self.ledger = SlotLedger(NUMBERS, ahead=2)
        self.now = 0.0
        self.held, self.past = [], []
        self.preparing, self.removing, self.ready = [], [], []
        self.free = list(NUMBERS)

    @rule(waiting=st.integers(0, 3))
    def start_preparing(self, waiting):
        number = self.ledger.next_preparation(self.now, waiting=waiting)
        if number is not None:
            assert number == self.free.pop(0), "oldest first"
            self.preparing.append(number)

    @precondition(lambda self: self.preparing)
    @rule(fails=st.booleans(), which=st.integers(0, 9))
    def finish_preparing(self, fails, which):
        number = self.preparing.pop(which % len(self.preparing))
        if fails:
            assert 0 < self.ledger.preparation_failed(number, self.now) <= LAST_BACKOFF_SECONDS
        else:
            self.ledger.prepared(number)
            self.ready.append(number)

    @rule()
    def take(self):
        slot = self.ledger.take_ready()
        assert (slot is None) == (not self.ready)
        if slot is not None:
            assert slot.number == self.ready.pop(0)
            self.held.append(slot)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9))
    def release(self, which):
        slot = self.held.pop(which % len(self.held))
        assert self.ledger.release(slot)
        self.past.append(slot)

    @precondition(lambda self: self.past)
    @rule(which=st.integers(0, 99))
    def release_twice(self, which):
        assert not self.ledger.release(self.past[which % len(self.past)]), "whoever holds the number now keeps it"

    @rule()
    def start_removing(self):
        number = self.ledger.next_removal(self.now)
        if number is not None:
            self.removing.append(number)

    @precondition(lambda self: self.removing)
    @rule(fails=st.booleans(), which=st.integers(0, 9))
    def finish_removing(self, fails, which):
        number = self.removing.pop(which % len(self.removing))
        if fails:
            assert 0 < self.ledger.removal_failed(number, self.now) <= LAST_BACKOFF_SECONDS
        else:
            self.ledger.removed(number)
            self.free.append(number)

    @rule()
    def let_time_pass(self):
        due = self.ledger.next_due(self.now)
        self.now = self.now + 1 if due == math.inf else due

    @invariant()
    def every_number_is_in_one_place(self):
        now = self.ledger.statistics(waiting=0)
        assert now.free + now.preparing + now.ready + now.in_use + now.removing == len(NUMBERS)
        assert now.in_use == len(self.held)
        assert len({slot.number for slot in self.held}) == len(self.held), "no number has two tenants"
        assert now.preparing + len(self.removing) <= WORKERS

    @invariant()
    def nothing_is_lost(self):
        now = self.ledger.statistics(waiting=0)
        assert self.ledger.coming() == now.free + now.preparing + now.removing


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedger = LedgerMachine.TestCase


def test_backoff_grows_and_is_bounded():
    """A host without network does not spin, and is tried again within half a minute for ever."""
    ledger, now, delays = SlotLedger(range(1, 2), ahead=1), 0.0, []
    for _ in range(12):
        number = ledger.next_preparation(now, waiting=0)
        delays.append(ledger.preparation_failed(number, now))
        ledger.removed(ledger.next_removal(now))
        assert ledger.next_preparation(now, waiting=0) is None, "not before the delay is over"
        now = ledger.next_due(now)
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == LAST_BACKOFF_SECONDS
