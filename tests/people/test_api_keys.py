"""API keys as their use-cases see them, over a real database."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from uuid import uuid4

import pytest
import trio

from capsule import errors
from capsule.auth.keys import ApiKeyAuthenticator, digest
from capsule.config import Settings
from capsule.db.pool import open_database
from capsule.db.queries import teams, users
from capsule.people.api_keys import ApiKeys
from capsule.principals import Principal

SETTINGS = Settings(database_url="postgresql://", secret_key="s" * 32)


class Team:
    """A team with an owner, an admin and two members, and the keys' use-cases."""

    def __init__(self, db):
        self.db = db
        self.keys = ApiKeys(db, SETTINGS)
        self.id = None
        self.people = {}

    async def fill(self):
        async def make(tx):
            rows = [await users.insert(tx, email=f"{uuid4().hex}@example.org", name="<b>Ada</b>") for _ in range(4)]
            team = await teams.insert(tx, name="T", owner_id=rows[0].id)
            for row, role in zip(rows[1:], ("admin", "member", "member"), strict=True):
                await tx.execute(
                    "insert into memberships (team_id, user_id, role) values ($1, $2, $3)", team.id, row.id, role
                )
            return team.id, rows

        self.id, rows = await self.db.transaction(make)
        for name, row, role in zip(
            ("owner", "admin", "ann", "bob"), rows, ("owner", "admin", "member", "member"), strict=True
        ):
            self.people[name] = Principal(
                team_id=self.id, actor_type="user", actor_id=row.id, actor_name=row.email, role=role
            )
        return self

    def __getattr__(self, name):
        return self.people[name]

    async def sql(self, statement, *parameters):
        return await self.db.run(lambda connection: connection.fetch(statement, *parameters))

    async def make(self, who, name="ci", idempotency_key=None):
        return await self.keys.create(who, name=name, idempotency_key=idempotency_key)

    async def trail(self):
        rows = await self.sql("select * from audit_logs where team_id = $1 order by created_at, id", self.id)
        return [
            (row["action"], row["status"], row["scope"], row["resource_id"], row["actor_name"], row["metadata"])
            for row in rows
        ]


@pytest.fixture
async def db(postgres_dsn):
    async with open_database(postgres_dsn) as database:
        yield database


@pytest.fixture
async def team(db):
    return await Team(db).fill()


async def test_a_key_is_good_at_once_and_says_who_made_it(team):
    """The database has its hash only; the principal is the key, by id and name."""
    made = await team.make(team.ann)
    principal = await ApiKeyAuthenticator(team.db).api_key(made.key)
    assert (principal.actor_type, principal.actor_id, principal.actor_name) == ("api_key", made.view.id, "ci")
    assert (principal.team_id, principal.role) == (team.id, "member")
    assert made.view.created_by.user_id == team.ann.actor_id
    assert made.view.prefix == made.key[:12]
    (row,) = await team.sql("select * from api_keys where id = $1", made.view.id)
    assert row["sha256"] == digest(made.key)
    assert made.key not in repr(dict(row))


async def test_members_see_and_end_their_own_and_admins_all(team):
    """A team-mate's key is Forbidden to a plain member; what is not the team's is not there for anybody."""
    mine, other = await team.make(team.ann), await team.make(team.bob)
    listed = {who: (await team.keys.list(team.people[who], 50, None)).items for who in team.people}
    assert [view.id for view in listed["ann"]] == [mine.view.id]
    assert [view.id for view in listed["bob"]] == [other.view.id]
    assert [view.id for view in listed["admin"]] == [other.view.id, mine.view.id] == [v.id for v in listed["owner"]]
    with pytest.raises(errors.Forbidden):
        await team.keys.revoke(team.ann, other.view.id)
    await team.keys.revoke(team.ann, mine.view.id)
    with pytest.raises(errors.NotFound):
        await team.keys.revoke(team.ann, mine.view.id)
    await team.keys.revoke(team.admin, other.view.id)
    assert (await team.keys.list(team.owner, 50, None)).items == ()
    stranger = await Team(team.db).fill()
    foreign = await stranger.make(stranger.owner)
    for who in (team.ann, team.owner):
        for key in (foreign.view.id, uuid4()):
            with pytest.raises(errors.NotFound):
                await team.keys.revoke(who, key)


async def test_the_trail_tells_of_making_and_ending(team):
    """One row each, by the person, with the key's name; a second revocation is none."""
    made = await team.make(team.ann, "<script>alert(1)</script>")
    await team.keys.revoke(team.admin, made.view.id)
    with pytest.raises(errors.NotFound):
        await team.keys.revoke(team.admin, made.view.id)
    key, name = f"key-{made.view.id}", {"name": "<script>alert(1)</script>"}
    assert await team.trail() == [
        ("create", "success", "team", key, team.ann.actor_name, name),
        ("revoke", "warning", "team", key, team.admin.actor_name, name),
    ]


async def test_pages_have_every_key_once(team):
    """Also when all were made in the same microsecond."""
    made = [(await team.make(team.ann, f"k{number}")).view.id for number in range(7)]
    await team.sql("update api_keys set created_at = now()")
    seen, before = [], None
    while True:
        page = await team.keys.list(team.admin, 2, before)
        seen += [view.id for view in page.items]
        if page.after is None:
            break
        before = page.after
    assert sorted(seen) == sorted(made)


async def test_the_limit_holds_for_many_at_once(team):
    """Twelve at once, room for five: five keys."""
    await team.sql("update teams set max_api_keys = 5 where id = $1", team.id)
    results = Counter()

    async def one(who):
        try:
            await team.make(who)
            results["made"] += 1
        except errors.QuotaExceeded as err:
            results[err.extra["limit"]] += 1

    async with trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(one, (team.ann, team.bob, team.admin)[number % 3])
    assert results == {"made": 5, "max_api_keys": 7}
    (row,) = await team.sql("select count(*) as n from api_keys")
    assert row["n"] == 5
    (kept,) = (await team.keys.list(team.admin, 1, None)).items
    await team.keys.revoke(team.admin, kept.id)
    await team.make(team.ann)


async def test_a_repeated_request_gets_the_same_key(team):
    """Five at once under one Idempotency-Key, and again later: one key, one row in the trail; no copy of it stored."""
    keys = set()

    async def one():
        keys.add((await team.make(team.ann, idempotency_key="again")).key)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    await one()
    assert len(keys) == 1
    assert len(await team.trail()) == 1
    (text,) = keys
    await ApiKeyAuthenticator(team.db).api_key(text)
    dump = repr([tuple(row) for table in ("api_keys", "idempotency_keys") for row in await team.sql(f"table {table}")])
    assert text not in dump
    assert text[12:] not in dump


async def test_an_idempotency_key_is_for_one_request_of_one_person(team):
    """Another name, another person of the team, or a key that was revoked since: refused, and nobody else's key."""
    made = await team.make(team.ann, idempotency_key="once")
    with pytest.raises(errors.IdempotencyKeyReused):
        await team.make(team.ann, "other", idempotency_key="once")
    with pytest.raises(errors.IdempotencyKeyReused):
        await team.make(team.bob, idempotency_key="once")
    await team.keys.revoke(team.ann, made.view.id)
    with pytest.raises(errors.Conflict, match="revoked"):
        await team.make(team.ann, idempotency_key="once")


async def test_after_a_day_the_idempotency_key_makes_another(team):
    """What the first was derived from is gone then."""
    first = await team.make(team.ann, idempotency_key="daily")
    await team.sql("update idempotency_keys set created_at = created_at - $1::interval", timedelta(hours=25))
    second = await team.make(team.ann, idempotency_key="daily")
    assert first.key != second.key


async def test_who_is_no_member_any_more_makes_and_ends_none(team):
    """Removed between being let in and acting: the transaction looks again."""
    made = await team.make(team.ann)
    await team.sql("delete from memberships where user_id = $1", team.ann.actor_id)
    with pytest.raises(errors.NoTeam):
        await team.make(team.ann)
    with pytest.raises(errors.NoTeam):
        await team.keys.revoke(team.ann, made.view.id)


async def test_a_demoted_admin_ends_no_others_key(team):
    """The role counts that they have when it is done, not when they asked."""
    made = await team.make(team.ann)
    await team.sql("update memberships set role = 'member' where user_id = $1", team.admin.actor_id)
    with pytest.raises(errors.Forbidden):
        await team.keys.revoke(team.admin, made.view.id)


async def test_no_key_slips_in_beside_the_removal_of_its_maker(team):
    """The removal is held open with the keys already revoked: a create waits for it and is then refused."""
    removing = trio.Event()
    token = trio.lowlevel.current_trio_token()
    outcome = []

    async def remove(tx):
        await tx.execute("delete from memberships where user_id = $1", team.ann.actor_id)
        await tx.execute("update api_keys set revoked_at = now() where created_by = $1", team.ann.actor_id)
        token.run_sync_soon(removing.set)
        await _somebody_waits(tx, 1)

    async def create():
        await removing.wait()
        try:
            await team.make(team.ann)
        except errors.NoTeam:
            outcome.append("refused")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(create)
        await team.db.transaction(remove, timeout=60)
    assert outcome == ["refused"]
    assert (
        await team.sql("select id from api_keys where revoked_at is null and created_by = $1", team.ann.actor_id) == []
    )


async def test_no_keys_for_a_deleted_team(team):
    await team.sql("update teams set deleted_at = now() where id = $1", team.id)
    with pytest.raises(errors.NoTeam):
        await team.make(team.owner)


async def test_of_many_revocations_at_once_one_succeeds(team):
    """All are held up at the key until they wait for each other; the trail has one row of it."""
    made = await team.make(team.ann)
    results = Counter()
    token, held = trio.lowlevel.current_trio_token(), trio.Event()

    async def hold(tx):
        await tx.execute("select from api_keys where id = $1 for update", made.view.id)
        token.run_sync_soon(held.set)
        await _somebody_waits(tx, 4)

    async def one(who):
        await held.wait()
        try:
            await team.keys.revoke(who, made.view.id)
            results["revoked"] += 1
        except errors.NotFound:
            results["gone"] += 1

    async with trio.open_nursery() as nursery:
        for who in (team.ann, team.admin, team.owner) * 2:
            nursery.start_soon(one, who)
        await team.db.transaction(hold, timeout=60)
    assert results == {"revoked": 1, "gone": 5}
    assert [row[0] for row in await team.trail()] == ["create", "revoke"]


async def _somebody_waits(tx, number):
    """Until so many wait for a lock, or half a minute: then the test fails by what it counts."""
    for _ in range(1500):
        if await tx.fetchval("select count(*) from pg_locks where not granted") >= number:
            return
        await tx.execute("select pg_sleep(0.02)")
