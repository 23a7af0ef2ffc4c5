"""One leader among processes on one database."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import partial

import pytest
import trio

from capsule.db import lease as lease_module
from capsule.db.connection import Connection
from capsule.db.errors import LeadLost
from capsule.db.pool import Database, open_database

OURS = "locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())"


@pytest.fixture
def unlocked(db: Database, eventually):
    """Waits until no session of this database holds an advisory lock."""

    async def free() -> bool:
        return await db.run(lambda tx: tx.fetchval(f"select count(*) = 0 from pg_locks where {OURS}"))  # noqa: S608

    return lambda: eventually(free)


async def test_there_is_one_leader_per_key(db: Database, postgres_dsn: str, unlocked):
    """A second process gets None while the first leads, and leads once it has let go; other keys are other matters."""
    async with open_database(postgres_dsn) as other:
        first = await db.try_lead("monitor")
        assert first is not None
        async with first:
            assert await other.try_lead("monitor") is None
            assert await db.try_lead("monitor") is None
            sampler = await other.try_lead("sampler")
            assert sampler is not None
            await sampler.release()
            assert not first.lost.is_set()
        assert first.lost.is_set()
        second = await other.try_lead("monitor")
        assert second is not None
        await second.release()
        await second.release()
    await unlocked()


async def test_a_leader_that_dies_is_replaced_at_once(db: Database, postgres_dsn: str, unlocked):
    """Closing a process's database ends its leases; the next one leads."""
    async with open_database(postgres_dsn) as other:
        lease = await other.try_lead("monitor")
        assert lease is not None
    with trio.fail_after(20):
        await lease.lost.wait()
    await unlocked()
    again = await db.try_lead("monitor")
    assert again is not None
    await again.release()


async def test_a_killed_session_sets_lost(db: Database):
    """The server ends the session that holds the lock: the leader is told without asking."""
    lease = await db.try_lead("monitor")
    assert lease is not None

    async def kill(tx: Connection) -> None:
        await tx.execute(f"select pg_terminate_backend(pid) from pg_locks where {OURS}")  # noqa: S608

    await db.run(kill)
    with trio.fail_after(20):
        await lease.lost.wait()
    await lease.release()


@pytest.fixture
async def stuck(db: Database, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch):
    """A lease that is kept, whose session's server process is stopped; and how to let that go on."""
    monkeypatch.setattr(lease_module, "STALL_LIMIT", 6.0)
    monkeypatch.setattr(lease_module, "KEEP_INTERVAL", 0.05)
    lease = await db.try_lead("monitor")
    assert lease is not None
    nursery.start_soon(lease.keep)
    pid = await db.run(lambda tx: tx.fetchval(f"select pid from pg_locks where {OURS}"))  # noqa: S608
    os.kill(pid, signal.SIGSTOP)
    try:
        yield lease, partial(os.kill, pid, signal.SIGCONT)
    finally:
        with suppress(ProcessLookupError):  # it ended
            os.kill(pid, signal.SIGCONT)


async def test_a_session_that_does_not_answer_is_given_up(stuck):
    """No answer for as long as the lease is surely ours: lost, whatever the network says."""
    lease, _ = stuck
    began = trio.current_time()
    with trio.fail_after(20):
        await lease.lost.wait()
    assert 3 < trio.current_time() - began < 15
    with pytest.raises(LeadLost):
        lease.check()


async def test_a_slow_answer_is_no_loss(stuck):
    """The question runs on; once it is answered the lease is ours for as long again."""
    lease, go_on = stuck
    await trio.sleep(2)
    go_on()
    await trio.sleep(5)
    assert not lease.lost.is_set()
    lease.check()
    await lease.release()


async def test_released_while_it_is_asked(stuck, unlocked):
    """The question is on its way: it ends with the session, and nobody hears of a driver that is out of step."""
    lease, go_on = stuck
    holder, asked, real = lease._holder, [], lease._holder.ask

    async def ask(seconds):
        asked.append(seconds)
        return await real(seconds)

    holder.ask = ask
    with trio.fail_after(20):
        while not asked:  # and no answer, since the server's process is stopped
            await trio.sleep(0.01)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lease.release)
            while holder._connection is not None:
                await trio.sleep(0.01)
            go_on()
        await lease.lost.wait()
    await unlocked()


async def test_cancelling_while_asking_never_keeps_the_lock(db: Database, unlocked):
    """Cancelled after 0, 1, 2, … ms: a lease nobody holds does not lock others out for ever."""
    for n in range(20):
        with trio.move_on_after(n * 0.001) as scope:
            lease = await db.try_lead("monitor")
        if not scope.cancelled_caught:
            assert lease is not None, n
            await lease.release()
        await unlocked()


async def test_a_lease_got_in_the_moment_of_cancellation_is_let_go(
    db: Database, unlocked, monkeypatch: pytest.MonkeyPatch
):
    """The lock was granted, and its asker cancelled before it heard of it."""
    call = db._bridge.call
    scope = trio.CancelScope()

    async def call_then_cancel(*args, **kwargs):
        result = await call(*args, **kwargs)
        assert result is True
        scope.cancel()
        await trio.lowlevel.checkpoint()
        return result

    monkeypatch.setattr(db._bridge, "call", call_then_cancel)
    with scope:
        await db.try_lead("monitor")
    assert scope.cancelled_caught
    monkeypatch.undo()
    await unlocked()
