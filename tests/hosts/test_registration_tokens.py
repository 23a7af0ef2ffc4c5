"""Where one-time tokens are kept: one suite for PostgreSQL and for Redis, both real; then what only Redis can do."""

from __future__ import annotations

from functools import partial
from uuid import uuid4

import pytest
import trio

from agent.enrol.identity import certificate_request, new_key
from capsule.config import Settings
from capsule.db.errors import DatabaseUnavailable
from capsule.db.pool import open_database
from capsule.db.queries import hosts
from capsule.errors import Conflict, NotFound, TokensUnavailable, Unauthorized
from capsule.hosts import tokens
from capsule.hosts.authority import load_authority
from capsule.hosts.redis_tokens import HOST_KEY, TOKEN_KEY, TokensInRedis
from capsule.hosts.registration import HostEnrolment
from capsule.hosts.registration_tokens import store_of
from capsule.model import HostRegistration

HASH = b"\7" * 32
OTHER = b"\10" * 32


class Stored:
    """A store, and what its operator can see of it and do to it."""

    def __init__(self, db, redis):
        self.db = db
        self.redis = redis
        self.settings = Settings(database_url="x", secret_key="s" * 32, redis_url=redis.url if redis else "")
        self.tokens = store_of(self.settings, db)

    async def sql(self, statement, *args):
        return await self.db.run(lambda connection: connection.fetch(statement, *args))

    async def seconds_left(self, sha256):
        if self.redis:
            return self.redis.client.pttl(TOKEN_KEY + sha256.hex()) / 1000
        query = "select expires_at - now() as left from host_registration_tokens where sha256 = $1"
        return (await self.sql(query, sha256))[0]["left"].total_seconds()

    async def expire(self):
        if self.redis:
            for key in self.redis.client.keys(f"{TOKEN_KEY}*"):
                self.redis.client.pexpire(key, 0)
        await self.sql("update host_registration_tokens set expires_at = now()")

    async def everything(self):
        texts = [str(dict(row.items())) for row in await self.sql("select * from host_registration_tokens")]
        if self.redis:
            keys = self.redis.client.keys("*")
            texts += [*keys, *(self.redis.client.get(key) for key in keys)]
        return "\n".join(texts)


@pytest.fixture
async def db(postgres_dsn):
    async with open_database(postgres_dsn) as database:
        yield database


@pytest.fixture(params=["database", "redis"])
def stored(request, db):
    if request.param == "database":
        return Stored(db, None)
    server = request.getfixturevalue("redis_server")
    server.client.flushall()
    return Stored(db, server)


@pytest.fixture
async def host(db):
    return (await db.transaction(partial(hosts.insert, type="regular"))).id


@pytest.fixture
async def enrolment(stored):
    return HostEnrolment(stored.db, await load_authority(stored.db, stored.settings), stored.settings)


async def the_host(tx, host):
    return host


async def fails(tx, host):
    await tx.execute("update hosts set provider = 'half' where id = $1", host)
    raise LookupError


def asking(token, address="192.0.2.7:7443"):
    return HostRegistration(
        token=token,
        address=address,
        arch="x86_64",
        cpu_cores=4,
        memory_mb=8192,
        disk_gb=100,
        csr_pem=certificate_request(new_key()),
    )


async def test_a_token_is_good_once(stored, host):
    """For its host, whoever asks; afterwards it is as unknown as one that never was."""
    await stored.tokens.keep(host, HASH, created_by=None)
    assert await stored.tokens.spend(OTHER, the_host) is None
    assert await stored.tokens.spend(HASH, the_host) == host
    assert await stored.tokens.spend(HASH, the_host) is None


async def test_of_many_at_once_one_gets_it(stored, host):
    """Also while some of those who have it fail: then another one does."""
    await stored.tokens.keep(host, HASH, created_by=None)
    outcomes = []

    async def spend(use):
        try:
            outcomes.append(await stored.tokens.spend(HASH, use))
        except LookupError:
            outcomes.append("failed")

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(spend, fails if number % 4 == 0 else the_host)
    assert outcomes.count(host) == 1
    assert await stored.tokens.spend(HASH, the_host) is None


async def test_a_failure_leaves_it_good(stored, host):
    """For no longer than it was, and nothing of the failed use is left."""
    await stored.tokens.keep(host, HASH, created_by=None)
    assert 3540 < await stored.seconds_left(HASH) <= 3600
    before = await stored.seconds_left(HASH)
    with pytest.raises(LookupError):
        await stored.tokens.spend(HASH, fails)
    assert await stored.seconds_left(HASH) <= before
    assert await stored.tokens.spend(HASH, the_host) == host
    assert (await stored.sql("select provider from hosts"))[0]["provider"] is None


async def test_a_use_that_is_cancelled_leaves_it_good(stored, host):
    """The client hung up in the middle of the transaction."""
    await stored.tokens.keep(host, HASH, created_by=None)
    asleep = "select from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'"

    async def slow(tx, host):
        await tx.execute("select pg_sleep(60)")
        return host

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stored.tokens.spend, HASH, slow)
            while not await stored.sql(asleep):  # the server has it: a cancellation before that may come too early
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert await stored.tokens.spend(HASH, the_host) == host


async def test_a_newer_one_voids_the_older(stored, host):
    await stored.tokens.keep(host, HASH, created_by=None)
    await stored.tokens.keep(host, OTHER, created_by=None)
    assert await stored.tokens.spend(HASH, the_host) is None
    assert await stored.tokens.spend(OTHER, the_host) == host


async def test_it_expires(stored, host):
    await stored.tokens.keep(host, HASH, created_by=None)
    await stored.expire()
    assert await stored.tokens.spend(HASH, the_host) is None


async def test_it_ends_with_its_host(stored, host):
    await stored.tokens.keep(host, HASH, created_by=None)
    await stored.sql("update hosts set deleted_at = now()")
    assert await stored.tokens.spend(HASH, the_host) is None


async def test_a_registration_from_start_to_end(stored, enrolment):
    """The same words whatever keeps the tokens; only hashes are kept."""
    new = await enrolment.create_host()
    assert new.registration_token.removeprefix(tokens.REGISTRATION_PREFIX) not in await stored.everything()
    got = await enrolment.register(asking(new.registration_token))
    assert got.host.id == new.host.id
    with pytest.raises(Unauthorized):
        await enrolment.register(asking(new.registration_token))
    again = await enrolment.register(asking(await enrolment.new_token(new.host.id)))
    assert again.host.id == new.host.id
    with pytest.raises(NotFound):
        await enrolment.new_token(uuid4())


async def test_a_refused_registration_leaves_it_good(stored, enrolment):
    """The address is another host's: the operator mends it and tries again."""
    there = await enrolment.create_host()
    await enrolment.register(asking(there.registration_token))
    await stored.sql("update hosts set proven_epoch = 1")
    new = await enrolment.create_host()
    with pytest.raises(Conflict):
        await enrolment.register(asking(new.registration_token))
    await enrolment.register(asking(new.registration_token, "192.0.2.8:7443"))


async def test_a_database_that_is_away_spends_nothing(stored, host, tmp_path):
    await stored.tokens.keep(host, HASH, created_by=None)
    async with open_database(f"postgresql:///none?host={tmp_path}") as nowhere:
        with pytest.raises(DatabaseUnavailable):
            await store_of(stored.settings, nowhere).spend(HASH, the_host)
    assert await stored.tokens.spend(HASH, the_host) == host


async def test_a_commit_that_was_not_seen(stored, host, monkeypatch):
    """The transaction took place, its answer was lost: whoever comes again finds the token spent."""
    await stored.tokens.keep(host, HASH, created_by=None)
    transaction = stored.db.transaction

    async def lose_the_answer(*args, **options):
        await transaction(*args, **options)
        raise DatabaseUnavailable("lost")

    with monkeypatch.context() as patch:
        patch.setattr(stored.db, "transaction", lose_the_answer)
        with pytest.raises(DatabaseUnavailable):
            await stored.tokens.spend(HASH, the_host)
    assert await stored.tokens.spend(HASH, the_host) is None


# only Redis


async def test_redis_that_is_away_spends_nothing(own_redis, db, host):
    """A typed error at once; when it is back on the same address it is used, without its tokens."""
    store = TokensInRedis(own_redis.url, db)
    await store.keep(host, HASH, created_by=None)
    own_redis.stop()
    for ask in (store.keep(host, OTHER, created_by=None), store.spend(HASH, the_host)):
        with trio.fail_after(30), pytest.raises(TokensUnavailable) as caught:
            await ask
        assert caught.value.retry_after
    assert await db.run(lambda tx: tx.fetch("select from host_registration_tokens")) == []
    own_redis.start()
    assert await store.spend(HASH, the_host) is None
    await store.keep(host, OTHER, created_by=None)
    assert await store.spend(OTHER, the_host) == host


async def test_redis_that_does_not_answer_spends_nothing(own_redis, db, host):
    """It hangs: many who ask get their error within bounds, the event loop goes on, and later the token is good."""
    store = TokensInRedis(own_redis.url, db)
    await store.keep(host, HASH, created_by=None)
    refused = []

    async def spend():
        with pytest.raises(TokensUnavailable):
            await store.spend(HASH, the_host)
        refused.append(trio.current_time())

    own_redis.pause()
    try:
        with trio.fail_after(40):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(spend)
    finally:
        own_redis.go_on()
    assert len(refused) == 20
    assert await store.spend(HASH, the_host) == host


async def test_redis_is_left_as_it_was(redis_server, db, host):
    """What we put there ends by itself."""
    redis_server.client.flushall()
    store = TokensInRedis(redis_server.url, db)
    await store.keep(host, HASH, created_by=None)
    assert all(0 < redis_server.client.ttl(key) <= 3600 for key in (TOKEN_KEY + HASH.hex(), f"{HOST_KEY}{host}"))
    assert len(redis_server.client.keys("*")) == 2
