"""What each query promises to those who build on it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID, uuid4

import pytest

from capsule.db.connection import Connection
from capsule.db.errors import ConstraintViolated
from capsule.db.pool import Database
from capsule.db.queries import (
    audit,
    certificate_authority,
    hosts,
    idempotency,
    keys,
    refresh_tokens,
    teams,
    templates,
    users,
)
from capsule.db.queries.sandboxes import SandboxRow
from capsule.db.queries.teams import PLATFORM, TeamRow
from tests.db.rivals import together

MakeSandbox = Callable[[], Awaitable[SandboxRow]]

HASH = bytes(range(32))


async def test_users_and_teams(db: Database, team: TeamRow):
    """An account is found by its address, in small letters; a team has slug, owner and limits until it is deleted."""
    user = await db.transaction(lambda tx: users.insert(tx, email="Ada@Example.com", name="Ada", password_hash="h"))
    assert await db.run(users.by_email, "ada@example.com") == user
    assert await db.run(users.by_email, "Ada@Example.com") is None
    assert await db.run(users.get, user.id) == user
    assert user.sessions_valid_from is None
    assert await db.run(teams.get, team.id) == team
    limits = teams.TeamLimits(max_sandboxes=1000, max_templates=200, max_vcpus=8, max_memory_mb=16384)
    assert await db.run(teams.limits, team.id) == limits
    await db.transaction(lambda tx: tx.execute("update teams set deleted_at = now() where id = $1", team.id))
    assert await db.run(teams.limits, team.id) is None


async def test_api_keys(db: Database, team: TeamRow):
    """Found by hash while not revoked, with the team's state; last_used_at at most once a minute."""
    key = await db.transaction(
        lambda tx: keys.insert(tx, team_id=team.id, name="ci", prefix="cap_01234567", sha256=HASH, created_by=None)
    )
    assert key.team_alive
    assert await db.run(keys.by_hash, HASH) == key
    assert await db.run(keys.by_hash, bytes(32)) is None
    listed = await db.run(keys.listed, key.id)
    assert listed is not None
    assert (listed.name, listed.created_at, listed.creator_email) == ("ci", key.created_at, None)
    assert await db.run(partial(keys.page, team_id=team.id, limit=9)) == [listed]
    await db.run(keys.touch_last_used, key.id)
    used = await db.run(keys.by_hash, HASH)
    assert used is not None
    assert used.last_used_at is not None
    await db.run(keys.touch_last_used, key.id)
    assert await db.run(keys.by_hash, HASH) == used
    await db.transaction(lambda tx: tx.execute("update teams set deleted_at = now() where id = $1", team.id))
    orphan = await db.run(keys.by_hash, HASH)
    assert orphan is not None
    assert not orphan.team_alive
    assert not await db.run(keys.revoke, uuid4(), key.id)
    assert await db.run(keys.revoke, team.id, key.id)
    assert not await db.run(keys.revoke, team.id, key.id)
    assert await db.run(keys.by_hash, HASH) is None


async def test_a_registration_token_is_taken_once(db: Database, soon: datetime):
    """Of ten that show it at once one gets the host; a rolled back registration leaves it good; expired is expired."""
    host = await db.transaction(lambda tx: hosts.insert(tx, type="regular"))
    put = partial(hosts.insert_registration_token, host_id=host.id, sha256=HASH, expires_at=soon)
    await db.transaction(put)

    async def take_and_fail(tx: Connection) -> None:
        assert await hosts.take_registration_token(tx, HASH) == host.id
        raise LookupError

    with pytest.raises(LookupError):
        await db.transaction(take_and_fail)
    taken = await together(10, lambda _n: db.transaction(hosts.take_registration_token, HASH))
    assert (taken.count(host.id), taken.count(None)) == (1, 9)
    old = partial(put, sha256=bytes(32), expires_at=datetime.now(UTC) - timedelta(seconds=1))
    await db.transaction(old)
    assert await db.transaction(hosts.take_registration_token, bytes(32)) is None


async def test_a_newer_registration_token_voids_the_older(db: Database, soon: datetime):
    """Only the last one handed out can be used, and none of a deleted host."""
    host = await db.transaction(lambda tx: hosts.insert(tx, type="regular"))
    put = partial(hosts.insert_registration_token, host_id=host.id, expires_at=soon)
    await db.transaction(partial(put, sha256=HASH))
    await db.transaction(partial(put, sha256=bytes(32)))
    assert await db.transaction(hosts.take_registration_token, HASH) is None
    await db.transaction(lambda tx: tx.execute("update hosts set deleted_at = now()"))
    assert await db.transaction(hosts.take_registration_token, bytes(32)) is None


async def test_registration_heartbeat_and_status_of_a_host(db: Database, host: UUID, soon: datetime):
    """Registering begins a new credential epoch and ends its refresh tokens, and its being online until it is proven to
    be where it says; status is compare-and-set; a heartbeat is only a heartbeat; a deleted host is gone for all."""
    row = await db.run(hosts.get, host)
    assert row is not None
    assert (row.status, row.generation, row.credential_epoch, row.tags) == ("online", 2, 1, [])
    await db.run(lambda tx: tx.execute("insert into host_tags values ($1, 'gpu'), ($1, 'a')", host))
    issue = partial(refresh_tokens.insert, host_id=host, family=uuid4(), sha256=HASH, expires_at=soon)
    await db.transaction(issue)
    again = partial(
        hosts.register,
        address="10.0.0.1:7001",
        cert_fingerprint="ab" * 32,
        arch="x86_64",
        cpu_cores=1,
        memory_mb=1,
        disk_gb=1,
    )
    row = await db.transaction(again, host)
    assert row is not None
    assert (row.status, row.generation, row.credential_epoch, row.tags) == ("unreachable", 3, 2, ["a", "gpu"])
    assert not row.proven
    rotate = partial(refresh_tokens.rotate, sha256=HASH, new_sha256=bytes(32), expires_at=soon)
    assert await db.transaction(rotate) is None
    claim = {"from_status": "unreachable", "generation": 3, "epoch": 2}
    claim |= {"address": "10.0.0.1:7001", "cert_fingerprint": "ab" * 32}
    for wrong in ({"epoch": 1}, {"generation": 2}, {"address": "10.0.0.2:7001"}, {"cert_fingerprint": "cd" * 32}):
        assert await db.transaction(partial(hosts.prove, host_id=host, **{**claim, **wrong})) is None
    results = await together(4, lambda _n: db.transaction(partial(hosts.prove, host_id=host, **claim)))
    assert [(r.status, r.generation, r.proven) for r in results if r is not None] == [("online", 4, True)]
    down = partial(hosts.mark_status, from_status="online", generation=4, to_status="unreachable")
    results = await together(4, lambda _n: db.transaction(down, host))
    assert len([r for r in results if r is not None]) == 1
    beaten = await db.run(hosts.heartbeat, host)
    assert beaten is not None
    assert (beaten.status, beaten.generation) == ("unreachable", 5)
    assert await db.transaction(hosts.pin_certificate, host, "cd" * 32)
    assert [r.id for r in await db.run(hosts.list_all)] == [host]
    assert await db.run(partial(hosts.list_all, statuses=["online"])) == []
    await db.transaction(lambda tx: tx.execute("update hosts set deleted_at = now() where id = $1", host))
    assert await db.run(hosts.heartbeat, host) is None
    assert await db.run(hosts.get, host) is None
    assert await db.run(hosts.list_all) == []
    assert not await db.transaction(hosts.pin_certificate, host, "ef" * 32)
    assert await db.transaction(again, host) is None


async def test_a_refresh_token_is_spent_once(db: Database, host: UUID, soon: datetime):
    """Of ten that show it at once one gets the next of the family; a spent one is known as spent; a revoked family is
    dead to its last member."""
    first = await db.transaction(
        partial(refresh_tokens.insert, host_id=host, family=uuid4(), sha256=bytes(32), expires_at=soon)
    )

    async def rotate(n: int) -> refresh_tokens.RefreshTokenRow | None:
        new = bytes([n + 1] * 32)
        return await db.transaction(partial(refresh_tokens.rotate, sha256=bytes(32), new_sha256=new, expires_at=soon))

    (second,) = [row for row in await together(10, rotate) if row is not None]
    assert isinstance(second, refresh_tokens.RefreshTokenRow)
    assert (second.family, second.host_id) == (first.family, host)
    spent = await db.run(refresh_tokens.get, bytes(32))
    assert spent is not None
    assert spent.superseded_at is not None
    await db.transaction(refresh_tokens.revoke_family, first.family)
    revoked = await db.run(lambda tx: tx.fetchval("select bool_and(revoked_at is not null) from host_refresh_tokens"))
    assert revoked


async def test_the_first_certificate_authority_counts(db: Database):
    """Control planes that start at once agree on one."""
    assert await db.run(certificate_authority.get) is None

    async def make(n: int) -> str:
        put = partial(certificate_authority.insert_if_absent, cert_pem=f"cert {n}", key_pem="key")
        return (await db.transaction(put)).cert_pem

    assert len(set(await together(5, make))) == 1


async def test_templates(db: Database, team: TeamRow):
    """A base image is everyone's and is brought up to date; the team's own of the same name goes before it."""
    base = await db.transaction(lambda tx: templates.upsert_base(tx, name="minimal", size_bytes=1))
    newer = await db.transaction(lambda tx: templates.upsert_base(tx, name="minimal", size_bytes=2))
    assert (newer.id, newer.size_bytes, newer.platform, newer.team_id) == (base.id, 2, True, PLATFORM)
    assert await db.run(templates.get_by_name, team.id, "minimal") == newer
    own = "insert into templates (team_id, name, type, vcpus, memory_mb) values ($1, 'minimal', 'snapshot', 1, 512)"
    await db.transaction(lambda tx: tx.execute(own, team.id))
    mine = await db.run(templates.get_by_name, team.id, "minimal")
    assert mine is not None
    assert (mine.team_id, mine.platform) == (team.id, False)
    listed = partial(templates.list_page, limit=10, before=None)
    assert await db.run(partial(listed, type=None), team.id) == [mine, newer]
    assert await db.run(partial(listed, type="base"), team.id) == [newer]
    assert await db.run(partial(listed, type=None), uuid4()) == [newer]
    after = partial(templates.list_page, type=None, limit=10, before=(mine.created_at, mine.id))
    assert await db.run(after, team.id) == [newer]
    assert await db.run(templates.get_by_name, team.id, "none") is None


async def test_audit_rows_go_with_their_transaction(db: Database, team: TeamRow):
    """A row is there exactly if the action is; the system has no id, everybody else has one."""
    append = partial(
        audit.append,
        actor_type="api_key",
        actor_id=uuid4(),
        actor_name="ci",
        team_id=team.id,
        resource_type="sandbox",
        resource_id=uuid4(),
        action="create",
        metadata={"template": "minimal"},
    )

    async def act_and_fail(tx: Connection) -> None:
        await append(tx)
        raise LookupError

    with pytest.raises(LookupError):
        await db.transaction(act_and_fail)
    await db.transaction(append)
    (row,) = await db.run(lambda tx: tx.fetch("select * from audit_logs"))
    assert (row["metadata"], row["scope"], row["status"]) == ({"template": "minimal"}, "team", "success")
    with pytest.raises(ConstraintViolated, match="audit_logs_actor"):
        await db.transaction(partial(append, actor_id=None))


async def test_an_idempotency_key_makes_one_resource(db: Database, team: TeamRow):
    """Ten at once: one claims, the others learn what it made. Rolled back, the key is free. After a day, too."""

    async def claim(n: int) -> UUID | None:
        row = await db.transaction(idempotency.claim, team.id, "k", HASH, UUID(int=n))
        return row.resource_id if row else None

    results = await together(10, claim)
    row = await db.run(idempotency.get, team.id, "k")
    assert row is not None
    assert (results.count(row.resource_id), results.count(None)) == (9, 1)
    assert row.request_sha256 == HASH

    async def claim_and_fail(tx: Connection) -> None:
        assert await idempotency.claim(tx, team.id, "other", HASH, uuid4()) is None
        raise LookupError

    with pytest.raises(LookupError):
        await db.transaction(claim_and_fail)
    assert await db.run(idempotency.get, team.id, "other") is None
    await db.run(lambda tx: tx.execute("update idempotency_keys set created_at = now() - interval '25 hours'"))
    assert await db.run(idempotency.get, team.id, "k") is None
    assert await claim(99) is None
