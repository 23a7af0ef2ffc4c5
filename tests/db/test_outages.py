"""The server goes away in every way it can, and comes back; nothing of ours is started again."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from capsule.db import cluster
from capsule.db import lease as lease_module
from capsule.db.connection import Connection
from capsule.db.embedded import PostgresHandle, run_postgres
from capsule.db.errors import DatabaseUnavailable
from capsule.db.pool import Database, open_database


@pytest.fixture
async def server(postgres_server, postgres_directory: Path) -> AsyncIterator[PostgresHandle]:
    """A server of the test's own, to be ill-treated."""
    directory = postgres_directory
    postgres_server.copy_cluster(directory / "data")
    run = partial(
        run_postgres,
        directory / "data",
        runtime=directory / "run",
        cache=directory / "cache",
        durable=False,
    )
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            handle = await nursery.start(run)
        yield handle
        nursery.cancel_scope.cancel()


@pytest.fixture
async def db(server: PostgresHandle) -> AsyncIterator[Database]:
    async with open_database(server.dsn, max_size=3) as database:
        yield database


async def _one(tx: Connection) -> int:
    return await tx.fetchval("select 1")


async def _three_at_once(db: Database) -> None:
    """Every place in the pool is free, and has a connection afterwards."""
    arrived = []

    async def hold(tx: Connection) -> None:
        arrived.append(tx)
        while len(arrived) < 3:
            await tx.execute("select pg_sleep(0.01)")

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(db.transaction, hold)


async def _sleep(tx: Connection) -> None:
    await tx.execute("select pg_sleep(60)")


def _signal_all(server: PostgresHandle, number: int) -> None:
    """To the server and all its processes, the server first."""
    assert server.pid is not None
    data = Path(f"/proc/{server.pid}/cwd").resolve()
    for pid in sorted(cluster._processes_on(data), key=lambda pid: pid != server.pid):
        with suppress(ProcessLookupError):  # it ended since it was listed
            os.kill(pid, number)


@pytest.fixture
def back(db: Database, server: PostgresHandle, eventually):
    """Waits until the server has been started again so many times and answers."""

    async def wait(restarts: int) -> None:
        await eventually(lambda: server.restarts >= restarts and server.pid is not None)
        await db.wait_available(timeout=20)

    return wait


async def test_a_killed_server_fails_calls_and_is_back_for_the_next(
    db: Database, server: PostgresHandle, back, eventually
):
    """kill -9 in the middle of a transaction: that call is unavailable at once, the launcher starts the server again,
    and the same pool goes on working, with what was committed before."""
    await db.transaction(lambda tx: tx.execute("create table kept as select 1 as x"))
    lease = await db.try_lead("monitor")
    assert lease is not None
    for round_ in (1, 2):
        killed = server.pid
        assert killed is not None
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:

                async def in_flight() -> None:
                    with pytest.raises(DatabaseUnavailable):
                        await db.transaction(_sleep, timeout=60)

                nursery.start_soon(in_flight)
                await eventually(lambda: db.statistics().in_flight > 0)
                os.kill(killed, signal.SIGKILL)
        await back(round_)
        assert server.pid != killed
        assert await db.run(lambda tx: tx.fetchval("select x from kept")) == 1
        assert lease.lost.is_set()
    level = db.statistics()
    assert level.in_flight == 0


async def test_a_shut_down_server_is_unavailable_then_back(db: Database, server: PostgresHandle, back):
    """A fast shutdown by an operator looks the same to callers."""
    await db.ping()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGINT)
    await back(1)
    assert await db.transaction(_one) == 1


async def test_a_frozen_server_costs_a_call_its_time_out_and_no_more(
    db: Database, server: PostgresHandle, eventually, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
):
    """SIGSTOP to all its processes: calls in flight and new ones end by their time-outs, also for a cancelled caller; a
    lease is given up; after SIGCONT everything works, with the same launcher and pool."""
    monkeypatch.setattr(lease_module, "KEEP_INTERVAL", 0.2)
    monkeypatch.setattr(lease_module, "STALL_LIMIT", 3.0)
    lease = await db.try_lead("monitor")
    assert lease is not None
    nursery.start_soon(lease.keep)
    inside = []

    async def work(tx: Connection) -> None:
        await _one(tx)
        inside.append(tx)
        await _sleep(tx)

    async def cancelled_while_it_cleans_up_after_its_time_out() -> None:
        with trio.move_on_after(3.4) as scope:
            await db.transaction(work, timeout=3)
        assert scope.cancelled_caught

    await _three_at_once(db)  # making a connection may take as long
    try:
        async with trio.open_nursery() as callers:
            for _ in range(3):
                callers.start_soon(cancelled_while_it_cleans_up_after_its_time_out)
            await eventually(lambda: len(inside) == 3)
            _signal_all(server, signal.SIGSTOP)
        for _ in range(5):  # more than there are connections: none is lost
            with trio.fail_after(12), pytest.raises(DatabaseUnavailable, match="within"):
                await db.transaction(_one, timeout=0.2)
        began = trio.current_time()
        with trio.move_on_after(0.2):
            await db.run(_one, timeout=30)
        assert trio.current_time() - began < 20
        with trio.fail_after(20):
            await lease.lost.wait()
    finally:
        _signal_all(server, signal.SIGCONT)
    await db.wait_available(timeout=30)
    await eventually(lambda: db.statistics().in_flight == 0)
    await _three_at_once(db)


async def test_closing_a_frozen_database_is_bounded(server: PostgresHandle):
    """A control plane that stops while its database hangs does stop."""
    try:
        with trio.fail_after(40):
            async with open_database(server.dsn) as db:
                lease = await db.try_lead("monitor")
                assert lease is not None
                await db.ping()
                _signal_all(server, signal.SIGSTOP)
                began = trio.current_time()
    finally:
        _signal_all(server, signal.SIGCONT)
    assert trio.current_time() - began < 20
