"""Opener and server over one connection: calls, cancellation, deadlines, faults."""

from __future__ import annotations

import math

import pytest
import structlog
import trio
from trio.testing import wait_all_tasks_blocked

from agent.actor.peer import GRACE
from agent.wire import limits
from agent.wire.faults import Fault, FaultCode


async def echo(method, body, stream):
    """Answers with its own body; the streams' content comes back as it was."""
    async for channel, data in stream:
        await stream.send(data, channel=channel)
    return {"method": method, **body}


async def wait_for_ever(method, body, stream):
    await trio.sleep_forever()


async def test_call(joined):
    """A body goes there and an answer comes back."""
    async with joined(echo) as (opener, _):
        assert await opener.call("m", {"k": [1, "x", None]}, timeout=5) == {"method": "m", "k": [1, "x", None]}


async def test_a_fault_arrives_as_it_was_raised(joined):
    """Code, message, retryable and details cross the wire."""

    async def handler(method, body, stream):
        raise Fault("not_found", "no such thing", retryable=True, details={"id": 7})

    async with joined(handler) as (opener, _):
        with pytest.raises(Fault) as caught:
            await opener.call("m", {}, timeout=5)
    fault = caught.value
    assert (fault.code, fault.message) == ("not_found", "no such thing")
    assert (fault.retryable, fault.details) == (True, {"id": 7})


async def test_leaving_the_block_cancels_the_handler(joined):
    """The handler is stopped where it waits, may clean up, and its slot is free afterwards."""
    cleaned = trio.Event()

    async def handler(method, body, stream):
        try:
            await trio.sleep_forever()
        finally:
            cleaned.set()

    async with joined(handler) as (opener, server):
        async with opener.open_stream("m", {}):
            await wait_all_tasks_blocked()
            assert server.link.open_streams() == 1
        with trio.fail_after(5):
            await cleaned.wait()
        await wait_all_tasks_blocked()
        assert server.link.open_streams() == opener.link.open_streams() == 0


async def test_the_handler_of_a_cancelled_stream_answers_cancelled(joined):
    """What the server says to a CANCEL, seen by somebody who still listens."""
    async with joined(wait_for_ever) as (opener, _):
        async with opener.open_stream("m", {}) as stream:
            pass
        with pytest.raises(Fault, match="cancelled by its caller") as caught:
            await stream.reply()
        assert caught.value.code == FaultCode.CANCELLED


async def test_a_handler_that_finishes_its_work_after_cancel_has_answered(joined):
    """CANCEL is a wish: an answer that was on its way counts."""

    async def handler(method, body, stream):
        with trio.CancelScope(shield=True):
            async for _ in stream:
                pass
            await trio.lowlevel.checkpoint()
        return {"done": True}

    async with joined(handler) as (opener, _):
        async with opener.open_stream("m", {}) as stream:
            await stream.end()
        assert await stream.reply() == {"done": True}


async def test_the_data_of_an_abandoned_stream_is_dropped(joined):
    """A server that goes on sending after CANCEL until its credit is spent: nothing is kept, the slot is freed."""
    finish = trio.Event()

    async def stubborn(method, body, stream):
        with trio.CancelScope(shield=True):
            await finish.wait()
            await stream.send(b"x" * limits.INITIAL_CREDIT)
        return {}

    async with joined(stubborn) as (opener, _):
        async with opener.open_stream("m", {}) as stream:
            await wait_all_tasks_blocked()
        assert opener.link.open_streams() == 1
        finish.set()
        await wait_all_tasks_blocked()
        assert opener.link.open_streams() == 0
        assert not stream.inbox._chunks
        finish = trio.Event()
        finish.set()
        assert await opener.call("m", {}, timeout=5) == {}


async def test_the_deadline_travels_and_is_kept_by_the_server(joined, autojump_clock):
    """The handler knows its deadline, and is stopped at it with a fault that says so."""
    seen = []

    async def handler(method, body, stream):
        seen.append(stream.deadline - trio.current_time())
        await trio.sleep_forever()

    async with joined(handler) as (opener, _):
        began = trio.current_time()
        with pytest.raises(Fault, match="did not finish in time") as caught:
            await opener.call("m", {}, timeout=7.5)
        assert caught.value.code == FaultCode.DEADLINE_EXCEEDED
        assert caught.value.retryable
        assert trio.current_time() - began == pytest.approx(7.5)
        assert seen == [pytest.approx(7.5)]


async def test_no_timeout_means_no_deadline(joined):
    """An open stream without `timeout` may live as long as it likes."""
    seen = []

    async def handler(method, body, stream):
        seen.append(stream.deadline)
        return {}

    async with joined(handler) as (opener, _), opener.open_stream("m", {}) as stream:
        await stream.reply()
    assert seen == [math.inf]


async def test_a_server_that_misses_the_deadline_is_not_waited_for(joined, autojump_clock):
    """The opener gives up a grace later, and the whole block with it; the late answer harms nobody."""
    release = trio.Event()

    async def stubborn(method, body, stream):
        with trio.CancelScope(shield=True):
            await release.wait()
        return {}

    async with joined(stubborn) as (opener, _):
        began = trio.current_time()
        with pytest.raises(Fault, match="no answer in 3 s") as caught:
            await opener.call("m", {}, timeout=3)
        assert caught.value.code == FaultCode.DEADLINE_EXCEEDED
        assert trio.current_time() - began == pytest.approx(3 + GRACE)
        release.set()
        assert await opener.call("m", {}, timeout=3) == {}


async def test_waiting_for_room_counts_against_the_deadline(joined, autojump_clock, monkeypatch):
    """`timeout_ms` is what is left when OPEN leaves, not what there was when the caller asked."""
    seen = []

    async def handler(method, body, stream):
        seen.append(stream.deadline - trio.current_time())
        return {}

    async with joined(handler) as (opener, _):
        held = trio.Event()

        async def wait_for_room() -> None:
            await held.wait()

        monkeypatch.setattr(opener, "_wait_for_room", wait_for_room)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: opener.call("m", {}, timeout=10))
            await trio.sleep(4)
            held.set()
    assert seen == [pytest.approx(6)]


@pytest.mark.parametrize("in_nursery", [False, True])
async def test_a_handlers_bug_is_internal_and_logged(joined, in_nursery):
    """Any exception, also in a group, is `internal` for the caller and a traceback in the log; nothing leaks."""

    async def handler(method, body, stream):
        if not in_nursery:
            raise ZeroDivisionError("secret")
        async with trio.open_nursery():
            raise ZeroDivisionError("secret")

    async with joined(handler) as (opener, _):
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                with pytest.raises(Fault) as caught:
                    await opener.call("m", {}, timeout=5)
                assert caught.value.code == FaultCode.INTERNAL
                assert "secret" not in caught.value.message
    assert [(entry["event"], entry["method"]) for entry in logs] == [("handler_failed", "m")] * 3


async def test_a_bug_in_a_cancelled_handler_does_not_end_the_connection(joined):
    """Clean-up that fails while the handler is cancelled: a group of Cancelled and the bug, which must not escape."""

    async def broken_cleanup():
        try:
            await trio.sleep_forever()
        finally:
            raise ZeroDivisionError

    async def handler(method, body, stream):
        if method == "ok":
            return {}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broken_cleanup)
            nursery.start_soon(trio.sleep_forever)
            await trio.sleep_forever()
        raise AssertionError

    async with joined(handler) as (opener, _):
        with structlog.testing.capture_logs() as logs:
            async with opener.open_stream("m", {}) as stream:
                await wait_all_tasks_blocked()
            with pytest.raises(Fault, match="cancelled"):
                await stream.reply()
        assert [entry["event"] for entry in logs] == ["handler_failed"]
        assert await opener.call("ok", {}, timeout=5) == {}


async def test_a_bug_while_the_connection_ends_stays_in_the_connection(joined):
    """The same while the whole connection is being cancelled: `run` still returns."""

    async def handler(method, body, stream):
        try:
            await trio.sleep_forever()
        finally:
            raise ZeroDivisionError

    with structlog.testing.capture_logs() as logs:
        async with joined(handler) as (opener, server), trio.open_nursery() as nursery:
            nursery.start_soon(_expect_lost, opener)
            await wait_all_tasks_blocked()
            server.close()
    assert [entry["event"] for entry in logs] == ["handler_failed"]


async def _expect_lost(opener):
    with pytest.raises(Fault, match="lost"):
        await opener.call("m", {}, timeout=5)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ({"k": b"x" * limits.MAX_FRAME_BYTES}, FaultCode.TOO_LARGE),
        (None, FaultCode.INTERNAL),
        ({"k": object()}, FaultCode.INTERNAL),
        ({"k": {1: 2}}, FaultCode.INTERNAL),
        (Fault("c" * 65, "message"), FaultCode.INTERNAL),
        (Fault("not_found", "m", details={"k": object()}), FaultCode.INTERNAL),
    ],
)
async def test_an_answer_that_cannot_be_sent(joined, answer, code):
    """The handler's mistake is its own call's failure: the caller gets a fault, everybody else goes on."""

    async def handler(method, body, stream):
        if method == "ok":
            return {}
        if isinstance(answer, Fault):
            raise answer
        return answer

    async with joined(handler) as (opener, _):
        with structlog.testing.capture_logs() as logs, pytest.raises(Fault) as caught:
            await opener.call("m", {}, timeout=5)
        assert caught.value.code == code
        assert [entry["event"] for entry in logs] == ["answer_refused"]
        assert await opener.call("ok", {}, timeout=5) == {}


async def test_a_message_that_is_not_unicode_or_too_long_still_arrives(joined):
    """File names in messages need not be UTF-8, and nobody counts characters before raising."""

    async def handler(method, body, stream):
        raise Fault("not_found", "no file \udcff" + "x" * 5000)

    async with joined(handler) as (opener, _):
        with pytest.raises(Fault) as caught:
            await opener.call("m", {}, timeout=5)
    assert caught.value.code == FaultCode.NOT_FOUND
    assert caught.value.message.startswith("no file ?xxx")
    assert len(caught.value.message) == 4096


@pytest.mark.parametrize("body", [{"k": object()}, {"k": {1: 2}}, {"k": b"x" * limits.MAX_FRAME_BYTES}])
async def test_a_body_that_cannot_be_sent_is_the_callers_mistake(joined, body):
    """`invalid_argument` for this call; the connection never hears of it."""
    async with joined(echo) as (opener, _):
        with pytest.raises(Fault) as caught:
            await opener.call("m", body, timeout=5)
        assert caught.value.code == FaultCode.INVALID_ARGUMENT
        assert await opener.call("m", {}, timeout=5) == {"method": "m"}


async def test_a_thousand_calls_at_once(joined):
    """Each gets its own answer."""
    answers = {}

    async def handler(method, body, stream):
        await trio.lowlevel.checkpoint()
        return {"n": body["n"]}

    async with joined(handler) as (opener, _):

        async def ask(number: int) -> None:
            answers[number] = (await opener.call("m", {"n": number}, timeout=30))["n"]

        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(ask, number)
                if number % 100 == 0:  # starting them all is a long step of its own
                    await trio.lowlevel.checkpoint()
    assert answers == {number: number for number in range(1000)}


async def test_one_stream_too_many_is_busy(joined):
    """The opener knows the server's limit and says Busy without asking; an answered stream makes room."""
    release = trio.Event()

    async def handler(method, body, stream):
        await release.wait()
        return {}

    async with joined(handler, max_streams=3) as (opener, server), trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: opener.call("m", {}, timeout=5))
        await wait_all_tasks_blocked()
        with pytest.raises(Fault) as caught:
            await opener.call("m", {}, timeout=5)
        assert caught.value.code == FaultCode.BUSY
        assert caught.value.retryable
        assert server.link.open_streams() == 3
        release.set()
        await wait_all_tasks_blocked()
        assert await opener.call("m", {}, timeout=5) == {}


async def test_a_connection_without_ids_left_ends(joined):
    """The owner dials again; the caller may retry."""
    async with joined(echo) as (opener, _):
        opener.link._last_id = limits.MAX_STREAM_ID
        with pytest.raises(Fault, match="used up") as caught:
            await opener.call("m", {}, timeout=5)
        assert caught.value.retryable
        await opener.closed.wait()
