"""The way from Trio to PostgreSQL and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio

from capsule.db.connection import Connection
from capsule.db.errors import ConstraintViolated, DatabaseUnavailable
from capsule.db.pool import Database, open_database


async def _one(tx: Connection) -> int:
    return await tx.fetchval("select 1")


async def _sleep(tx: Connection, seconds: float) -> None:
    await tx.execute("select pg_sleep($1)", seconds)


async def _add(tx: Connection, bucket: str) -> None:
    await tx.execute("insert into rate_limits values ($1, now(), 1)", bucket)


async def _buckets(tx: Connection) -> int:
    return await tx.fetchval("select count(*) from rate_limits")


def _all_idle(db: Database) -> bool:
    level = db.statistics()
    return level.idle == level.connections and level.in_flight == 0


def _busy(db: Database, calls: int) -> bool:
    return db.statistics().in_flight == calls


async def test_a_transaction_gives_its_result_and_commits(db: Database):
    """What `fn` returns comes back, what it wrote stays."""
    assert await db.transaction(_one) == 1
    await db.transaction(_add, "a")
    assert await db.run(_buckets) == 1


async def test_an_exception_rolls_back_and_comes_out_as_it_is(eventually, db: Database):
    """A use-case's own exception reaches its Trio caller, and nothing it wrote stays."""

    async def fail(tx: Connection) -> None:
        await _add(tx, "a")
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await db.transaction(fail)
    assert await db.run(_buckets) == 0
    await eventually(lambda: _all_idle(db))


async def test_a_broken_constraint_comes_out_with_its_name_only(db: Database):
    """ConstraintViolated carries the rule, never the offending values."""

    async def twice(tx: Connection) -> None:
        for _ in range(2):
            await tx.execute("insert into users (email, name) values ('secret@example.com', 'x')")

    with pytest.raises(ConstraintViolated) as caught:
        await db.transaction(twice)
    assert (caught.value.name, caught.value.table) == ("users_email_key", "users")
    assert "secret" not in str(caught.value)


async def test_json_and_addresses_come_as_plain_values(db: Database):
    """jsonb is a dict both ways, inet is text both ways."""

    async def echo(tx: Connection):
        return await tx.fetchrow("select $1::jsonb as j, $2::inet as i", {"ä": [1, None]}, "10.11.0.7")

    row = await db.run(echo)
    assert (row["j"], row["i"]) == ({"ä": [1, None]}, "10.11.0.7")


async def test_many_calls_at_once_share_few_connections(db: Database):
    """A hundred concurrent transactions finish on four connections, each with its own result."""
    results = []

    async def ask(n: int) -> None:
        async def echo(tx: Connection) -> int:
            return await tx.fetchval("select $1::int", n)

        results.append((n, await db.transaction(echo)))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for n in range(100):
                nursery.start_soon(ask, n)
    assert sorted(results) == [(n, n) for n in range(100)]
    assert db.statistics().connections <= 4


async def test_cancelling_at_every_moment_leaks_no_connection(eventually, db: Database):
    """Transactions cancelled after 0, 1, 2, … ms: each is whole or absent, the pool is intact, and a connection never
    gives the answer to somebody else's question."""

    async def slow(tx: Connection, bucket: str) -> None:
        await _add(tx, bucket)
        await tx.execute("select pg_sleep(0.003)")
        await _add(tx, bucket + "'")

    done = 0
    for n in range(40):
        with trio.move_on_after(n * 0.0005):
            await db.transaction(slow, f"b{n}")
            done += 1
        nonce = 7_000_000 + n

        async def echo(tx: Connection, nonce: int = nonce) -> int:
            return await tx.fetchval("select $1::int", nonce)

        assert await db.run(echo, timeout=30) == nonce
    written = await db.run(_buckets)
    assert written % 2 == 0
    assert written >= 2 * done
    await eventually(lambda: _all_idle(db))


async def test_cancelling_a_crowd_leaves_the_pool_whole(eventually, db: Database):
    """More calls than connections, all cancelled: those that held one and those that waited for one."""
    with trio.move_on_after(0.1):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(db.transaction, _sleep, 30.0)
    await eventually(lambda: _all_idle(db))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(db.transaction, _one)


async def test_a_cancelled_transaction_holds_no_lock_afterwards(db: Database):
    """When the cancelled caller goes on, its transaction is rolled back: the row is free."""
    await db.transaction(_add, "row")

    async def lock(tx: Connection) -> None:
        await tx.execute("update rate_limits set hits = 2")
        await tx.execute("select pg_sleep(30)")

    with trio.move_on_after(0.1):
        await db.transaction(lock, timeout=60)

    async def take(tx: Connection) -> None:
        await tx.execute("select from rate_limits for update nowait")

    await db.transaction(take, timeout=20)


async def test_a_call_ends_by_its_time_out(eventually, db: Database):
    """A slow statement is DatabaseUnavailable after `timeout`, and the pool is intact."""
    with trio.fail_after(20), pytest.raises(DatabaseUnavailable, match=r"within 0\.1 s"):
        await db.transaction(_sleep, 30.0, timeout=0.1)
    await eventually(lambda: _all_idle(db))


async def test_waiting_for_a_connection_counts_into_the_time_out(eventually, db: Database):
    """With every connection busy, a call is DatabaseUnavailable after `timeout`; it does not hang."""
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(partial(db.transaction, _sleep, 30.0, timeout=60))
        await eventually(lambda: _busy(db, 4))
        with trio.fail_after(20), pytest.raises(DatabaseUnavailable):
            await db.transaction(_one, timeout=0.2)
        nursery.cancel_scope.cancel()


async def test_serialization_failures_are_retried(db: Database):
    """Two rivals on one row under repeatable read: both counts arrive, without either caller noticing."""
    await db.transaction(_add, "row")
    looked = []

    async def increment(tx: Connection) -> None:
        hits = await tx.fetchval("select hits from rate_limits")
        looked.append(hits)
        while len(looked) < 2:  # neither writes before both have looked
            await tx.execute("select pg_sleep(0.01)")
        await tx.execute("update rate_limits set hits = $1", hits + 1)

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(partial(db.transaction, increment, isolation="repeatable_read"))

    async def hits(tx: Connection) -> int:
        return await tx.fetchval("select hits from rate_limits")

    assert await db.run(hits) == 3
    assert db.statistics().retries >= 1


async def test_endless_contention_is_unavailable(db: Database):
    """A transaction that never serializes is given up after a bounded number of attempts."""
    attempts = []

    async def never(tx: Connection) -> None:
        attempts.append(1)
        await tx.execute("do $$ begin raise serialization_failure; end $$")

    with pytest.raises(DatabaseUnavailable, match="too many"):
        await db.transaction(never)
    assert len(attempts) == 5


async def test_dead_idle_connections_are_replaced_unseen(db: Database):
    """All sessions killed while idle, as a restart of the server does: the next transaction just works."""

    arrived = []

    async def arrive(tx: Connection) -> None:
        arrived.append(tx)
        while len(arrived) < 4:
            await tx.execute("select pg_sleep(0.01)")

    async def kill_others(tx: Connection) -> list[bool]:
        rows = await tx.fetch(
            "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
            "where pid <> pg_backend_pid() and datname = current_database() and backend_type = 'client backend'"
        )
        return [ended for (ended,) in rows]

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(db.run, arrive)
    assert await db.run(kill_others, timeout=40) == [True] * 3
    for _ in range(8):
        assert await db.transaction(_one) == 1


async def test_a_connection_that_dies_between_pool_and_begin_is_replaced_unseen(
    db: Database, monkeypatch: pytest.MonkeyPatch
):
    """Nothing had happened on it yet, so the transaction simply takes the next."""
    acquire = db._driver._acquire
    killed = []

    async def acquire_and_kill():
        connection = await acquire()
        if not killed:
            killed.append(connection)
            other = await acquire()
            await other.execute("select pg_terminate_backend($1, 5000)", connection.get_server_pid())
            await db._driver._give_back(other, None)
        return connection

    monkeypatch.setattr(db._driver, "_acquire", acquire_and_kill)
    assert await db.transaction(_one) == 1
    assert killed


async def test_a_session_killed_in_the_middle_is_unavailable(db: Database):
    """The server ends our session under a transaction: typed, retryable, and the next call works."""

    async def suicide(tx: Connection) -> None:
        await tx.execute("select pg_terminate_backend(pg_backend_pid())")
        await tx.execute("select 1")

    with pytest.raises(DatabaseUnavailable):
        await db.transaction(suicide)
    with pytest.raises(DatabaseUnavailable):
        await db.run(suicide)
    assert await db.transaction(_one) == 1


async def test_opening_needs_no_server(tmp_path: Path):
    """With nothing there, opening succeeds, a call is DatabaseUnavailable at once, closing is quick."""
    with trio.fail_after(20):
        async with open_database(f"postgresql://capsule@/capsule?host={tmp_path}") as db:
            with pytest.raises(DatabaseUnavailable):
                await db.ping()
            with pytest.raises(DatabaseUnavailable):
                await db.try_lead("x")
            with pytest.raises(DatabaseUnavailable):
                await db.wait_available(timeout=0.3)


async def test_a_closed_database_says_so(postgres_dsn: str):
    """A call after the block is DatabaseUnavailable, not a hang."""
    async with open_database(postgres_dsn) as db:
        await db.ping()
    with trio.fail_after(20), pytest.raises(DatabaseUnavailable, match="closed"):
        await db.ping()


async def test_closing_is_bounded_while_a_call_runs(eventually, postgres_dsn: str):
    """Leaving the block with a statement under way ends that statement's call and the thread."""
    outcome = []

    async def linger(db: Database) -> None:
        try:
            await db.run(_sleep, 30.0, timeout=60)
        except DatabaseUnavailable:
            outcome.append("unavailable")

    async def open_and_leave(nursery: trio.Nursery) -> None:
        async with open_database(postgres_dsn) as db:
            nursery.start_soon(linger, db)
            await eventually(lambda: _busy(db, 1))

    with trio.fail_after(25):
        async with trio.open_nursery() as nursery:
            await open_and_leave(nursery)
    assert outcome == ["unavailable"]
