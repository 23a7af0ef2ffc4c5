"""The pool on a fake backend and a fake clock."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from agent.net.addresses import slot_addresses
from agent.net.errors import NoFreeSlots, PoolClosedError, SlotCreateError, SlotInspectError, SlotRemoveError
from agent.net.fake import FakeSlotBackend
from agent.net.ledger import WORKERS
from agent.net.pool import SlotPool


@asynccontextmanager
async def running(pool):
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        yield pool
        nursery.cancel_scope.cancel()


async def test_slots_are_prepared_ahead_and_no_further(autojump_clock):
    """`ahead` slots wait; each one taken is replaced at once, from the lowest number that was never used."""
    pool = SlotPool(FakeSlotBackend(), first=5, count=100, ahead=3)
    async with running(pool):
        await trio.sleep(1)
        assert pool.statistics().ready == 3
        slot = await pool.acquire()
        assert slot.number in {5, 6, 7}
        assert slot.addresses == slot_addresses(slot.number)
        await trio.sleep(1)
        assert (pool.statistics().ready, pool.statistics().in_use) == (3, 1)


async def test_acquire_of_a_prepared_slot_takes_no_time(autojump_clock):
    """The milliseconds of building are on nobody's path."""
    pool = SlotPool(FakeSlotBackend(seconds=1), ahead=2)
    async with running(pool):
        await trio.sleep(5)
        start = trio.current_time()
        await pool.acquire()
        assert trio.current_time() == start


async def test_waiters_are_served_in_order(autojump_clock):
    """More at once than were prepared: the first to come is the first to get one, all at most WORKERS at a time."""
    backend = FakeSlotBackend(seconds=1)
    pool = SlotPool(backend, ahead=1, count=50)
    leases = {}
    async with running(pool):

        async def take(index):
            leases[index] = (await pool.acquire()).lease

        async with trio.open_nursery() as nursery:
            for index in range(10):
                nursery.start_soon(take, index)
                await wait_all_tasks_blocked()
    assert [leases[index] for index in range(10)] == sorted(leases.values())
    assert backend.most_at_work == WORKERS


async def test_a_number_comes_back_only_after_its_removal(autojump_clock):
    """Release does not wait; the next tenant waits until the old slot has gone and a new one stands."""
    backend = FakeSlotBackend(seconds=2)
    pool = SlotPool(backend, count=1, ahead=1)
    async with running(pool):
        first = await pool.acquire()
        released_at = trio.current_time()
        assert pool.release(first)
        again = await pool.acquire()
        assert (again.number, again.lease) == (first.number, first.lease + 1)
        assert trio.current_time() == released_at + 4
    assert backend.log == [("create", 1), ("remove", 1), ("create", 1)]


async def test_reuse_is_oldest_first(autojump_clock):
    """Never-used numbers first, then in the order of release: a number rests for as long as possible."""
    pool = SlotPool(FakeSlotBackend(), count=4, ahead=0)
    async with running(pool):
        slots = [await pool.acquire() for _ in range(4)]
        for index in (2, 0, 3):
            pool.release(slots[index])
            await trio.sleep(1)
        assert [(await pool.acquire()).number for _ in range(3)] == [3, 1, 4]


async def test_a_second_release_does_not_hit_the_next_tenant(autojump_clock):
    """Destroy during pause releases twice; by then the number is another sandbox's. Refused, and logged."""
    pool = SlotPool(FakeSlotBackend(), count=1, ahead=1)
    async with running(pool):
        mine = await pool.acquire()
        pool.release(mine)
        with capture_logs() as logs:
            assert not pool.release(mine), "while it is being removed"
            other = await pool.acquire()
            assert not pool.release(mine), "after it has been handed out again"
        assert other.number == mine.number
        assert pool.statistics().in_use == 1
        assert [entry["event"] for entry in logs] == ["slot_release_refused"] * 2
        assert all(entry["log_level"] == "error" for entry in logs)


async def test_release_by_number_of_a_slot_nobody_has(autojump_clock):
    """A number is refused as well when it has no tenant, in the range or not."""
    pool = SlotPool(FakeSlotBackend(), count=2)
    async with running(pool):
        slot = await pool.acquire()
        assert pool.release(slot.number)
        assert not pool.release(slot.number)
        assert not pool.release(999)


async def test_a_used_up_range_is_a_clear_error(autojump_clock):
    """No one waits for a slot that cannot come without a release; after a release there is one again."""
    pool = SlotPool(FakeSlotBackend(seconds=1), count=2, ahead=1)
    async with running(pool):
        slots = [await pool.acquire() for _ in range(2)]
        with pytest.raises(NoFreeSlots, match="all 2 network slots"):
            await pool.acquire()
        pool.release(slots[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.acquire)
            await wait_all_tasks_blocked()
            with pytest.raises(NoFreeSlots):
                await pool.acquire()  # the one that comes is promised to the first


async def test_a_waiter_with_a_deadline_leaves_no_trace(autojump_clock):
    """The caller's deadline ends the wait, and the slot made for it goes to the next one."""
    backend = FakeSlotBackend(seconds=10)
    pool = SlotPool(backend, count=1, ahead=0)
    async with running(pool):
        with trio.move_on_after(3) as scope:
            await pool.acquire()
        assert scope.cancelled_caught
        assert pool.statistics().waiting == 0
        with trio.fail_after(8):
            assert (await pool.acquire()).number == 1
    assert backend.log == [("create", 1)]


async def test_failing_preparation_backs_off_and_recovers(autojump_clock):
    """Failures are logged, tried again ever later, one at a time, and forgotten after the first success."""
    backend = FakeSlotBackend()
    backend.create_errors = [SlotCreateError("no module") for _ in range(5)]
    pool = SlotPool(backend, count=10, ahead=1)
    with capture_logs() as logs:
        async with running(pool):
            start = trio.current_time()
            await pool.acquire()
            assert trio.current_time() - start == pytest.approx(0.1 + 0.2 + 0.4 + 0.8 + 1.6)
            assert pool.statistics().failed_preparations == 5
            await trio.sleep(1)
            assert pool.statistics().free + pool.statistics().ready == 9, "failed numbers are usable again"
    waits = [entry["retry_seconds"] for entry in logs if entry["event"] == "slot_preparation_failed"]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6]


async def test_what_failed_to_build_is_removed_before_it_is_tried_again(autojump_clock):
    """Undoing may have failed too; a removal finds whatever is left."""
    backend = FakeSlotBackend()
    backend.create_errors = [SlotCreateError("half-made")]
    async with running(SlotPool(backend, count=1, ahead=1)) as pool:
        await pool.acquire()
    assert backend.log == [("remove", 1), ("create", 1)]


async def test_a_removal_that_fails_is_tried_until_it_succeeds(autojump_clock):
    """Its number is out of use meanwhile, others are not held up, and every failure is logged."""
    backend = FakeSlotBackend()
    pool = SlotPool(backend, count=2, ahead=0)
    with capture_logs() as logs:
        async with running(pool):
            first, second = await pool.acquire(), await pool.acquire()
            group = ExceptionGroup("removing", [OSError(16, "busy"), OSError(1, "not allowed")])
            backend.remove_errors = [SlotRemoveError("stuck") for _ in range(3)]
            for error in backend.remove_errors:
                error.__cause__ = group
            pool.release(first)
            await trio.sleep(0.05)
            assert pool.statistics().removing == 1
            backend.remove_errors, held_back = [], backend.remove_errors
            pool.release(second)
            assert (await pool.acquire()).number == 2, "one failing removal does not hold up another"
            backend.remove_errors = held_back
            await trio.sleep(10)
            assert (await pool.acquire()).number == 1
    failures = [entry for entry in logs if entry["event"] == "slot_removal_failed"]
    assert [entry["retry_seconds"] for entry in failures] == [0.1, 0.2, 0.4]
    assert "busy" in failures[0]["error"]
    assert "not allowed" in failures[0]["error"]


async def test_what_an_earlier_daemon_left_is_removed_and_what_lives_is_adopted(autojump_clock):
    """At the start everything existing but not adopted goes, in the range or not; adopted slots are nobody else's."""
    backend = FakeSlotBackend([1, 2, 3, 500])
    pool = SlotPool(backend, count=4, ahead=4)
    adopted = pool.adopt([2])
    async with running(pool):
        await trio.sleep(1)
        assert {number for job, number in backend.log if job == "remove"} == {1, 3, 500}
        assert (pool.statistics().ready, pool.statistics().in_use) == (3, 1)
        taken = {(await pool.acquire()).number for _ in range(3)}
        assert taken == {1, 3, 4}
        assert pool.release(adopted[2])
        assert (await pool.acquire()).number == 2


async def test_an_adopted_slot_outside_the_range_is_not_used_again(autojump_clock):
    """The range was made smaller: the slot serves its VM to the end and is then gone."""
    backend = FakeSlotBackend([77])
    pool = SlotPool(backend, count=1, ahead=0)
    slot = pool.adopt([77])[77]
    async with running(pool):
        pool.release(slot)
        await trio.sleep(1)
        assert backend.log == [("remove", 77)]
        assert pool.statistics().free == 1


async def test_adopted_slots_that_are_gone_are_reported(autojump_clock):
    """A VM without its network is somebody's problem, so it must be in the log."""
    pool = SlotPool(FakeSlotBackend(), count=3)
    pool.adopt([2])
    with capture_logs() as logs:
        async with running(pool):
            pass
    assert {"event": "adopted_slots_missing", "slots": [2], "log_level": "error"} in logs


async def test_adopting_late_or_twice_is_a_bug():
    """Both would give one slot to two sandboxes."""
    pool = SlotPool(FakeSlotBackend())
    pool.adopt([1])
    with pytest.raises(ValueError, match="slot 1"):
        pool.adopt([1])
    async with running(pool):
        with pytest.raises(RuntimeError):
            pool.adopt([2])


async def test_waiters_learn_that_the_pool_has_ended(autojump_clock):
    """Nobody hangs on a pool whose task is gone, neither those who wait nor those who come later."""
    backend = FakeSlotBackend()
    backend.create_errors = [SlotCreateError("no module")]
    pool = SlotPool(backend, ahead=0)
    outcome = []

    async def wait():
        try:
            await pool.acquire()
        except PoolClosedError as err:
            outcome.append(err)

    async with trio.open_nursery() as nursery, running(pool):
        nursery.start_soon(wait)
        await trio.sleep(0.05)  # it has failed, and backs off
    assert len(outcome) == 1
    with pytest.raises(PoolClosedError):
        await pool.acquire()


async def test_slots_that_cannot_be_listed_stop_the_start(autojump_clock):
    """Without knowing what exists the pool could hand out somebody's slot; the daemon must not start."""
    backend = FakeSlotBackend()
    backend.existing_errors = [SlotInspectError("no netlink")]
    pool = SlotPool(backend)
    with pytest.raises(SlotInspectError):
        await pool.run()
    with pytest.raises(PoolClosedError):
        await pool.acquire()


async def test_acquire_before_the_pool_runs_waits_for_it(autojump_clock):
    """Start-up order is not the caller's worry."""
    pool = SlotPool(FakeSlotBackend(), ahead=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.acquire)
        await wait_all_tasks_blocked()
        async with running(pool):
            await trio.sleep(1)
            assert pool.statistics().in_use == 1
