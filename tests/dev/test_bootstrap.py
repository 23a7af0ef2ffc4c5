"""What `capsule dev` puts into the database, and what it makes of it at the end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from agent.wire.lifecycle import Status
from capsule.auth.keys import ApiKeyAuthenticator, new_key
from capsule.db.queries import sandboxes
from capsule.dev import bootstrap


async def test_the_key_works_and_stays(db, sql):
    """Made once, in an account and a team of its own; good for the API; the same the next time."""
    key = await db.transaction(bootstrap.ensure_key, None)
    principal = await ApiKeyAuthenticator(db).api_key(key)
    assert principal.actor_name == bootstrap.KEY_NAME
    assert await db.transaction(bootstrap.ensure_key, key) == key
    assert len(await sql("select 1 from users")) == len(await sql("select 1 from memberships")) == 1


@pytest.mark.parametrize("trouble", ["lost", "unknown", "revoked", "team deleted"])
async def test_a_key_that_is_of_no_use_any_more_is_replaced(db, sql, trouble):
    """By one that works, for the same account."""
    stored = await db.transaction(bootstrap.ensure_key, None)
    match trouble:
        case "lost":
            stored = None
        case "unknown":
            stored = new_key().text
        case "revoked":
            await sql("update api_keys set revoked_at = now()")
        case "team deleted":
            await sql("update teams set deleted_at = now() where id <> $1", UUID(int=0))
    key = await db.transaction(bootstrap.ensure_key, stored)
    assert key != stored
    await ApiKeyAuthenticator(db).api_key(key)
    assert len(await sql("select 1 from users")) == 1


async def test_when_a_sandbox_can_be_created(db, sql, add_host):
    """With a host that was heard since we began, and the base image; not because it was there yesterday."""
    since = datetime.now(UTC) - timedelta(minutes=1)
    assert not await db.run(bootstrap.usable, since)
    host = await add_host()
    assert not await db.run(bootstrap.usable, since)
    await sql("insert into templates (team_id, name, type) values ($1, 'minimal', 'base')", UUID(int=0))
    assert await db.run(bootstrap.usable, since)
    assert not await db.run(bootstrap.usable, datetime.now(UTC) + timedelta(minutes=1))
    await sql("update hosts set status = 'unreachable', generation = generation + 1 where id = $1", host)
    assert not await db.run(bootstrap.usable, since)


async def test_a_host_that_is_known(db, sql, add_host):
    host = await add_host()
    assert await db.run(bootstrap.may_serve, host)
    assert not await db.run(bootstrap.may_serve, uuid4())
    await sql("update hosts set deleted_at = now()")
    assert not await db.run(bootstrap.may_serve, host)


async def test_every_sandbox_of_the_host_is_ended(db, sql, add_host):
    """Whatever its status: stopped, with the reason; those of others, and those that have ended, are not touched."""
    host, other = await add_host(), await add_host()
    await db.transaction(bootstrap.ensure_key, None)
    (team,) = await sql("select id from teams where id <> $1", UUID(int=0))
    ways = {
        "starting": [],
        "running": ["running"],
        "pausing": ["running", "pausing"],
        "paused": ["running", "pausing", "paused"],
        "resuming": ["running", "pausing", "paused", "resuming"],
        "missing": ["missing"],
        "stopping": ["stopping"],
        "error": ["error"],
    }
    assert ways.keys() == {str(status) for status in Status} - {"pending", "stopped"}
    deadline = datetime.now(UTC) + timedelta(hours=1)

    async def insert(tx, on, steps):
        row = await sandboxes.insert(
            tx,
            id=uuid4(),
            team_id=team["id"],
            template="minimal",
            vcpus=1,
            memory_mb=512,
            disk_mb=1024,
            timeout_sec=0,
            metadata={},
            transition_deadline=deadline,
        )
        for step in ["starting", *steps]:
            row = await sandboxes.change_status(
                tx,
                row.id,
                from_status=row.status,
                generation=row.generation,
                to_status=step,
                host_id=on,
                transition_deadline=deadline if step in {"starting", "pausing", "resuming", "stopping"} else None,
            )
        return row

    mine = {status: await db.transaction(insert, host, steps) for status, steps in ways.items()}
    theirs = await db.transaction(insert, other, ["running"])
    assert await db.transaction(bootstrap.end_sandboxes, host) == len(ways) - 1
    after = {name: await db.run(sandboxes.get_any, row.id) for name, row in mine.items()}
    assert after.pop("error") == mine["error"]
    assert {(row.status, row.reason) for row in after.values()} == {("stopped", "the platform was stopped")}
    assert await db.run(sandboxes.get_any, theirs.id) == theirs
    assert await db.transaction(bootstrap.end_sandboxes, host) == 0
