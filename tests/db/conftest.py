from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
import trio

from capsule.db.connection import Connection
from capsule.db.pool import Database, open_database
from capsule.db.queries import hosts, sandboxes, teams, users
from capsule.db.queries.sandboxes import SandboxRow
from capsule.db.queries.teams import TeamRow

Condition = Callable[[], bool | Awaitable[bool]]


@pytest.fixture
def eventually() -> Callable[[Condition], Awaitable[None]]:
    """Waits until a condition holds: looks at the level again and again, for at most 60 s."""

    async def holds(condition: Condition) -> bool:
        answer = condition()
        return answer if isinstance(answer, bool) else await answer

    async def wait(condition: Condition) -> None:
        with trio.fail_after(60):
            while not await holds(condition):
                await trio.sleep(0.01)

    return wait


@pytest.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    """A fresh migrated database, opened."""
    async with open_database(postgres_dsn, max_size=4) as database:
        yield database


@pytest.fixture
def soon() -> datetime:
    """A deadline that no test reaches."""
    return datetime.now(UTC) + timedelta(hours=1)


@pytest.fixture
async def team(db: Database) -> TeamRow:
    """A team with its owner."""

    async def make(tx: Connection) -> TeamRow:
        owner = await users.insert(tx, email=f"{uuid4().hex}@example.com", name="Ada")
        return await teams.insert(tx, name="Ada's Team", owner_id=owner.id)

    return await db.transaction(make)


@pytest.fixture
async def host(db: Database) -> UUID:
    """An online host."""

    async def make(tx: Connection) -> UUID:
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

    return await db.transaction(make)


@pytest.fixture
def sandbox(db: Database, team: TeamRow, soon: datetime) -> Callable[[], Awaitable[SandboxRow]]:
    """Makes pending sandboxes of the team."""

    async def make() -> SandboxRow:
        async def insert(tx: Connection) -> SandboxRow:
            return await sandboxes.insert(
                tx,
                id=uuid4(),
                team_id=team.id,
                template="minimal",
                vcpus=2,
                memory_mb=512,
                disk_mb=1024,
                timeout_sec=0,
                metadata={"a": "1"},
                transition_deadline=soon,
            )

        return await db.transaction(insert)

    return make
