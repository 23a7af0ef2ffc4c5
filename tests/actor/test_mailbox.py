"""Mailboxes: bounded, stop first, answers that nobody waits for any more."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from agent.actor.mailbox import Busy, Mailbox, ReplySlot
from agent.wire.faults import Fault, FaultCode


async def test_messages_come_in_order():
    """First in, first out."""
    mailbox = Mailbox[int]("box", 3)
    for number in range(3):
        mailbox.send_nowait(number)
    assert [await mailbox.receive() for _ in range(3)] == [0, 1, 2]


async def test_a_full_mailbox_is_busy_at_once():
    """`capacity` messages fit, one more is refused with a Fault for the edge; one taken makes room."""
    mailbox = Mailbox[int]("sandbox sb-1", 2)
    mailbox.send_nowait(1)
    mailbox.send_nowait(2)
    with pytest.raises(Busy, match="sandbox sb-1 is busy") as caught:
        mailbox.send_nowait(3)
    assert caught.value.code == FaultCode.BUSY
    assert caught.value.retryable
    await mailbox.receive()
    mailbox.send_nowait(4)
    assert mailbox.statistics().refused == 1


async def test_receive_waits_for_a_message():
    """And is woken by it."""
    mailbox = Mailbox[str]("box", 1)
    got = []

    async def actor() -> None:
        got.append(await mailbox.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(actor)
        await wait_all_tasks_blocked()
        assert got == []
        mailbox.send_nowait("x")
    assert got == ["x"]


async def test_stop_overtakes_everything_and_fits_into_a_full_mailbox():
    """The stop lane is read first; what was waiting comes back from `close`."""
    mailbox = Mailbox[str]("box", 2)
    mailbox.send_nowait("a")
    mailbox.send_nowait("b")
    assert mailbox.stop_nowait("stop")
    assert mailbox.stop_requested.is_set()
    assert await mailbox.receive() == "stop"
    assert mailbox.close() == ["a", "b"]


async def test_stop_wakes_a_waiting_actor():
    """An actor with nothing to do hears of it at once."""
    mailbox = Mailbox[str]("box", 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: _expect(mailbox, "stop"))
        await wait_all_tasks_blocked()
        mailbox.stop_nowait("stop")


async def _expect(mailbox, message):
    assert await mailbox.receive() == message


async def test_the_first_stop_stands():
    """A second one is refused, so that its asker waits for the first one's end instead of an answer of its own."""
    mailbox = Mailbox[str]("box", 1)
    assert mailbox.stop_nowait("first")
    assert not mailbox.stop_nowait("second")
    assert await mailbox.receive() == "first"
    assert await mailbox.receive() == "first"


async def test_a_closed_mailbox_takes_nothing():
    """Neither messages nor a stop: nobody would read them, and an asker would wait for ever."""
    mailbox = Mailbox[str]("box", 5)
    mailbox.send_nowait("a")
    assert mailbox.close() == ["a"]
    with pytest.raises(Busy):
        mailbox.send_nowait("b")
    assert not mailbox.stop_nowait("stop")
    assert mailbox.close() == []


async def test_a_stop_that_was_not_read_is_left_over():
    """An actor that ends by itself answers the stop request it never saw, too."""
    mailbox = Mailbox[str]("box", 5)
    mailbox.send_nowait("a")
    mailbox.stop_nowait("stop")
    assert mailbox.close() == ["stop", "a"]
    assert mailbox.close() == []


async def test_statistics():
    """Figures that add up."""
    mailbox = Mailbox[int]("box", 2)
    for number in range(4):
        try:
            mailbox.send_nowait(number)
        except Busy:
            continue
    await mailbox.receive()
    figures = mailbox.statistics()
    assert (figures.capacity, figures.waiting, figures.received, figures.refused) == (2, 1, 1, 2)
    assert not figures.stopping
    mailbox.stop_nowait(0)
    assert mailbox.statistics().stopping


async def test_a_cancelled_actor_does_not_take_another_message():
    """Cancellation comes before the queue."""
    mailbox = Mailbox[int]("box", 1)
    mailbox.send_nowait(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await mailbox.receive()
    assert scope.cancelled_caught
    assert mailbox.close() == [1]


async def test_an_answer_reaches_the_asker():
    """Before or after it starts to wait."""
    early, late = ReplySlot[int](), ReplySlot[int]()
    early.answer(1)
    assert await early.wait() == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_answer, late, 2)
        await wait_all_tasks_blocked()
        late.answer(2)
        assert late.answered()


async def _expect_answer(slot, value):
    assert await slot.wait() == value


async def test_the_first_answer_counts():
    """Whatever comes after it is ignored, also a failure."""
    slot = ReplySlot[int]()
    slot.answer(1)
    slot.answer(2)
    slot.fail(ValueError())
    assert await slot.wait() == 1
    failed = ReplySlot[int]()
    failed.fail(ValueError("no"))
    failed.answer(1)
    with pytest.raises(ValueError, match="no"):
        await failed.wait()


async def test_no_answer_in_time(autojump_clock):
    """At the deadline, to the moment; a late answer disturbs nobody."""
    slot = ReplySlot[int]()
    deadline = trio.current_time() + 30
    with pytest.raises(Fault) as caught:
        await slot.wait(deadline=deadline)
    assert caught.value.code == FaultCode.DEADLINE_EXCEEDED
    assert trio.current_time() == pytest.approx(deadline)
    slot.answer(1)


async def test_an_asker_that_went_away_is_tolerated():
    """A cancelled asker does not cancel the actor's work, nor break its answer."""
    slot = ReplySlot[int]()
    with trio.CancelScope() as scope:
        scope.cancel()
        await slot.wait()
    slot.answer(1)
    assert await slot.wait() == 1


class Actor:
    """One that, asked, asks the other before it answers."""

    def __init__(self, name: str) -> None:
        self.mailbox = Mailbox[ReplySlot[str]](name, 1)
        self.other: Actor | None = None

    async def run(self, patience: float) -> None:
        while True:
            slot = await self.mailbox.receive()
            question = ReplySlot[str]()
            try:
                self.other.mailbox.send_nowait(question)
                slot.answer(await question.wait(deadline=trio.current_time() + patience))
            except Fault as fault:
                slot.fail(fault)


@pytest.mark.parametrize("patience", [60.0, float("inf")])
async def test_two_actors_that_await_each_other(autojump_clock, patience):
    """The rule's reason: with a deadline both get a Fault, without one neither moves in an hour of virtual time."""
    first, second = Actor("first"), Actor("second")
    first.other, second.other = second, first
    slot = ReplySlot[str]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.run, patience)
        nursery.start_soon(second.run, patience)
        first.mailbox.send_nowait(slot)
        with pytest.raises(Fault) as caught:
            await slot.wait(deadline=trio.current_time() + 3600)
        assert slot.answered() == (patience == 60.0)
        assert caught.value.code == FaultCode.DEADLINE_EXCEEDED
        nursery.cancel_scope.cancel()
