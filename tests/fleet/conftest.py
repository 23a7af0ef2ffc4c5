"""Who looks after hosts: a platform admin, and the people of a team that brings its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
import trio

from capsule import control
from capsule.principals import Session, User


@pytest.fixture
async def keeper(people):
    """A platform admin who looks after hosts."""
    person = await people.sign_up("Keeper")
    await people.make_admin(person, "hosts")
    return person


@pytest.fixture
async def byoc(people):
    """A team with a member of each role that brings its own hosts."""
    team = await people.team_of_three()
    await people.sql("update teams set is_byoc = true where id = $1", team.id)
    return team


@pytest.fixture
def operator(world):
    """A platform admin who looks after hosts, acting in virtual time."""
    session = Session(id=uuid4(), issued_at=datetime.now(UTC), expires_at=datetime.now(UTC) + timedelta(hours=1))
    return User(id=uuid4(), email="op@example.com", name="Op", session=session, permissions=frozenset({"hosts"}))


@pytest.fixture
def fleet_of():
    """The use-cases of a control plane of `world`."""
    return lambda plane: control._fleet(plane.sandboxes, None)


@pytest.fixture
async def beats(world, nursery):
    """The heartbeats of all agents that are well."""
    nursery.start_soon(world.beat)


@pytest.fixture
def trail(world):
    """The audit rows of a host, or of sandboxes: (actor, scope, status, metadata) by action, in their order."""

    async def read(resource_type, action):
        rows = await world.sql(
            """select resource_id, actor_type, actor_name, scope, status, metadata::text from audit_logs
               where resource_type = $1 and action = $2 order by created_at, id""",
            resource_type,
            action,
        )
        return [tuple(row) for row in rows]

    return read


@pytest.fixture
def eventually():
    """Looks every half second of the clock."""

    async def wait(condition, seconds=300):
        with trio.move_on_after(seconds):
            while not await condition():
                await trio.sleep(0.5)
        assert await condition()

    return wait
