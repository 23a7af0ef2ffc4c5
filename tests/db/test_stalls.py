"""A leader that stalls is replaced, and writes nothing more when it comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest
import trio

from capsule.db import lease as lease_module
from capsule.db.connection import Connection
from capsule.db.errors import DatabaseUnavailable, LeadLost
from capsule.db.led import LedDatabase
from capsule.db.pool import Database

LIMIT = 4.0
"""Seconds here for what is STALL_LIMIT in life."""

LEADER = f"""
import structlog, sys, trio
from capsule.db import lease
from capsule.db.errors import LeadLost
from capsule.db.led import LedDatabase
from capsule.db.pool import open_database

lease.STALL_LIMIT, lease.KEEP_INTERVAL = {LIMIT}, 0.3

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


async def main():
    async with open_database(sys.argv[1]) as db, trio.open_nursery() as nursery:
        held = await db.try_lead("monitor")
        assert held is not None
        nursery.start_soon(held.keep)
        led = LedDatabase(db, held)
        asked = trio.lowlevel.FdStream(0)
        while await asked.receive_some(1):
            try:
                await led.transaction(lambda tx: tx.execute("insert into writes default values"))
            except LeadLost:
                print("lost", held.lost.is_set(), flush=True)
                break
            print("wrote", flush=True)
        nursery.cancel_scope.cancel()


trio.run(main)
"""
"""Writes as a leader, once for each byte it is sent, until it leads no more."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short limits, in this process."""
    monkeypatch.setattr(lease_module, "STALL_LIMIT", LIMIT)
    monkeypatch.setattr(lease_module, "KEEP_INTERVAL", 0.3)


@pytest.fixture
async def leader(db: Database, postgres_dsn: str) -> AsyncIterator[trio.Process]:
    """Another process that leads."""
    await db.run(lambda tx: tx.execute("create table writes (at timestamptz not null default clock_timestamp())"))
    command = [sys.executable, "-c", LEADER, postgres_dsn]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        with trio.move_on_after(10, shield=True):
            await process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.aclose()
        await process.stdout.aclose()


async def _ask(process: trio.Process) -> None:
    """For one write."""
    assert process.stdin is not None
    await process.stdin.send_all(b".")


async def _next_line(process: trio.Process) -> bytes:
    assert process.stdout is not None
    line = b""
    with trio.fail_after(30):
        while not line.endswith(b"\n"):
            line += await process.stdout.receive_some(1)
    return line


async def _writes(db: Database) -> int:
    count: int = await db.run(lambda tx: tx.fetchval("select count(*) from writes"))
    return count


async def _lead(db: Database) -> lease_module.Lease:
    with trio.fail_after(20):
        while (lease := await db.try_lead("monitor")) is None:
            await trio.sleep(0.05)
    return lease


async def test_a_stopped_process_leads_no_more(db: Database, leader: trio.Process):
    """SIGSTOP: another gets the lease within the limit. SIGCONT: it knows before it has written anything more."""
    for _ in range(10):  # for longer than the limit: at work it keeps the lease
        await _ask(leader)
        assert await _next_line(leader) == b"wrote\n"
        await trio.sleep(LIMIT / 8)
    assert await db.try_lead("monitor") is None
    os.kill(leader.pid, signal.SIGSTOP)  # between two writes
    await _ask(leader)
    began = trio.current_time()
    lease = await _lead(db)
    assert trio.current_time() - began < LIMIT + 10
    written = await _writes(db)
    os.kill(leader.pid, signal.SIGCONT)
    assert await _next_line(leader) == b"lost True\n"
    assert await _writes(db) == written
    assert await db.try_lead("monitor") is None
    await lease.release()


async def test_a_killed_process_is_replaced_at_once(db: Database, leader: trio.Process):
    """kill -9: its session ends with it."""
    await _ask(leader)
    await _next_line(leader)
    leader.kill()
    began = trio.current_time()
    lease = await _lead(db)
    assert trio.current_time() - began < LIMIT
    await lease.release()


async def test_a_loop_that_hangs_leads_no_more(
    db: Database, postgres_dsn: str, quick: None, nursery: trio.Nursery, eventually
):
    """The driver's thread lives on: it alone does not keep the lease. After the stall the first use is refused."""
    lease = await db.try_lead("monitor")
    assert lease is not None
    led = LedDatabase(db, lease)
    nursery.start_soon(lease.keep)
    await trio.sleep(LIMIT + 1)
    await led.run(_one)
    time.sleep(LIMIT + 1)  # noqa: ASYNC251 - that is the stall
    with pytest.raises(LeadLost):
        await led.run(_one)
    with pytest.raises(LeadLost):
        await led.transaction(_one)
    assert lease.lost.is_set()

    async def nobody_holds_it() -> bool:
        again = await db.try_lead("monitor")
        if again is not None:
            await again.release()
        return again is not None

    await eventually(nobody_holds_it)


async def test_a_lease_that_nobody_keeps_ends(db: Database, quick: None):
    """A leader that forgets to keep it does not lead for ever: the server ends it, and tells."""
    lease = await db.try_lead("monitor")
    assert lease is not None
    with trio.fail_after(LIMIT + 10):
        await lease.lost.wait()
    with pytest.raises(DatabaseUnavailable):
        await LedDatabase(db, lease).run(_one)


async def _one(tx: Connection) -> int:
    value: int = await tx.fetchval("select 1")
    return value
