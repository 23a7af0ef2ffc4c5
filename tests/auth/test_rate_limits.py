"""Counting attempts: over a real database, by several control planes at once."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from agent.actor.settings import SettingsError
from capsule import errors
from capsule.auth.rate_limits import RULES, RateLimits, Rule, retry_after, rules_of, subject_of
from capsule.db.pool import open_database
from capsule.db.queries import rate_limits

DAY = 86_400


@pytest.fixture
async def db(postgres_dsn):
    async with open_database(postgres_dsn, max_size=4) as database:
        yield database


async def attempts(limits, count, subject="someone"):
    """How many of `count` attempts at once pass."""
    passed = []

    async def attempt(chosen):
        try:
            await chosen.hit("try", subject)
        except errors.RateLimited:
            return
        passed.append(chosen)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(attempt, limits[number % len(limits)])
    return len(passed)


async def test_several_control_planes_count_together(postgres_dsn, db):
    """Forty attempts at once, over two processes' doors to one database: seven pass, and none later."""
    rules = {"try": Rule(7, DAY)}
    async with open_database(postgres_dsn, max_size=4) as other:
        both = [RateLimits(db, rules), RateLimits(other, rules)]
        assert await attempts(both, 40) == 7
        assert await attempts(both, 4) == 0


async def test_a_restart_forgives_nothing(postgres_dsn, db):
    """What one control plane counted, the next one knows; and a crash of the server keeps it."""
    rules = {"try": Rule(3, DAY)}
    assert await attempts([RateLimits(db, rules)], 2) == 2
    async with open_database(postgres_dsn) as later:
        assert await attempts([RateLimits(later, rules)], 3) == 1
    persistence = "select relpersistence::text from pg_class where relname = 'rate_limits'"
    assert await db.run(lambda connection: connection.fetchval(persistence)) == "p"


async def test_subjects_and_rules_are_apart(db):
    """One who is refused does not stand in another's way."""
    limits = RateLimits(db, {"try": Rule(1, DAY), "other": Rule(1, DAY)})
    await limits.hit("try", "a")
    with pytest.raises(errors.RateLimited) as refusal:
        await limits.hit("try", "a")
    assert 0 < refusal.value.retry_after <= 2 * DAY
    await limits.hit("try", "b")
    await limits.hit("other", "a")


async def test_the_window_slides(db):
    """What was counted a moment before the window turned counts on, and stops to a whole window later."""
    limits = RateLimits(db, {"try": Rule(4, DAY)})
    assert await attempts([limits], 5) == 4

    async def age(seconds):
        move = "update rate_limits set window_start = window_start - make_interval(secs => $1)"
        await db.run(lambda connection: connection.execute(move, seconds))

    await age(DAY)  # the same moment of the next window: the share that is left of the last one weighs
    elapsed = await db.run(lambda c: c.fetchval("select (extract(epoch from now()) / 86400 % 1)::float8"))
    if 0.001 < elapsed % 0.25 < 0.249:  # away from the turn of a quarter of the day, whose two sides differ
        assert await attempts([limits], 5) == int(4 - 4 * (1 - elapsed))
    await age(2 * DAY)
    assert await attempts([limits], 5) == 4


async def test_old_windows_are_forgotten(db):
    """And the ones that count are not."""
    limits = RateLimits(db, {"try": Rule(4, DAY)})
    await limits.hit("try", "new")
    old = "insert into rate_limits values ('try:old', now() - interval '3 days', 1)"
    await db.run(lambda connection: connection.execute(old))
    await db.transaction(rate_limits.prune)
    left = await db.run(lambda connection: connection.fetch("select bucket from rate_limits"))
    assert [row["bucket"] for row in left] == ["try:new"]


def weight(before, elapsed):
    return before * (1 - elapsed)


@given(limit=st.integers(1, 50), before=st.integers(0, 50), hits=st.integers(0, 50), elapsed=st.floats(0, 1, width=32))
def test_retry_after_is_long_enough(limit, before, hits, elapsed):
    """Who waits as long as we say, and is alone, gets through - by the rule that the statement goes by."""
    before, hits, elapsed = min(before, limit), min(hits, limit), min(elapsed, 0.999)
    if weight(before, elapsed) + hits + 1 <= limit:
        return
    rule = Rule(limit, 300)
    later = elapsed + retry_after(rule, hits, before, elapsed) / rule.seconds
    if later < 1:
        assert weight(before, later) + hits + 1 <= limit + 1e-9
    elif later < 2:
        assert weight(hits, later - 1) + 1 <= limit + 1e-9


@pytest.mark.parametrize(
    ("address", "subject"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("x" * 1000, "x" * 64),
    ],
)
def test_subjects_of_addresses(address, subject):
    """IPv6 by what one customer has; anything else is bounded."""
    assert subject_of(address) == subject


def test_rules_from_settings():
    """Named ones change, the others stay."""
    assert rules_of("") == RULES
    assert rules_of(" sign_up=5/60, login_account=1/1 ") == {
        **RULES,
        "sign_up": Rule(5, 60),
        "login_account": Rule(1, 1),
    }


@pytest.mark.parametrize("text", ["sign_up", "sign_up=0/60", "nothing=1/1", "sign_up=1/86401", "sign_up=1/60 login=2"])
def test_bad_rules_are_refused(text):
    """By the variable's name."""
    with pytest.raises(SettingsError, match="CAPSULE_RATE_LIMITS"):
        rules_of(text)
