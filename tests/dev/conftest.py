from __future__ import annotations

from uuid import UUID

import pytest
import trio

from capsule.db.pool import open_database
from capsule.db.queries import hosts


@pytest.fixture
def until():
    """Looks at a level, for at most 60 s: processes give no event."""

    async def wait(condition):
        with trio.fail_after(60):
            while not condition():
                await trio.sleep(0.005)

    return wait


@pytest.fixture
async def db(postgres_dsn):
    async with open_database(postgres_dsn, max_size=4) as database:
        yield database


@pytest.fixture
def sql(db):
    async def run(statement, *args):
        return await db.run(lambda connection: connection.fetch(statement, *args))

    return run


@pytest.fixture
def add_host(db):
    """A registered host, heard just now."""

    async def make(tx) -> UUID:
        row = await hosts.insert(tx, type="regular")
        registered = await hosts.register(
            tx,
            row.id,
            address=f"{row.id}:7001",
            cert_fingerprint=row.id.hex * 2,
            arch="x86_64",
            cpu_cores=4,
            memory_mb=8192,
            disk_gb=100,
        )
        assert registered is not None
        await hosts.prove(
            tx,
            row.id,
            from_status="pending",
            generation=1,
            epoch=1,
            address=registered.address or "",
            cert_fingerprint=registered.cert_fingerprint or "",
        )
        return row.id

    return lambda: db.transaction(make)
