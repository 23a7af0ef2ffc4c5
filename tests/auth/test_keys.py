from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsule.auth.keys import ApiKeyAuthenticator, canonical, digest, new_key, replayable_key
from capsule.db.pool import open_database
from capsule.db.queries import keys as rows
from capsule.errors import DatabaseUnavailable, NoTeam, Unauthorized

PLATFORM = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
async def db(postgres_dsn):
    async with open_database(postgres_dsn) as database:
        yield database


async def execute(db, statement, *parameters):
    async def run(connection):
        return await connection.fetchval(statement, *parameters)

    return await db.run(run)


async def stored(db, key, team=PLATFORM):
    return await db.transaction(
        lambda tx: rows.insert(tx, team_id=team, name="laptop", prefix=key.prefix, sha256=key.sha256, created_by=None)
    )


def test_a_key_is_a_prefix_and_160_bits():
    key = new_key()
    assert canonical(key.text) == key.text
    assert (len(key.text), key.prefix) == (44, key.text[:12])
    assert key.sha256 == digest(key.text)
    assert key.text != new_key().text


def test_a_replayable_key_hangs_on_all_it_is_made_from():
    """The same again for the same; another key for any other secret, salt, team, person or Idempotency-Key."""
    salt, team, user = uuid4(), uuid4(), uuid4()
    parts = {"secret": b"s" * 32, "salt": salt, "team": team, "user": user, "idempotency_key": "once"}
    key = replayable_key(**parts)
    assert canonical(key.text) == key.text
    assert key == replayable_key(**parts)
    assert (key.prefix, key.sha256) == (key.text[:12], digest(key.text))
    others = [{"secret": b"t" * 32}, {"salt": team}, {"team": user}, {"user": salt}, {"idempotency_key": "twice"}]
    assert len({replayable_key(**{**parts, **other}).text for other in [{}, *others]}) == 6
    assert replayable_key(**{**parts, "team": user, "user": team}) != key


def test_the_alias_is_the_same_key():
    key = new_key()
    assert canonical("e2b_" + key.text[4:]) == key.text


@pytest.mark.parametrize(
    "text", ["", "cap_", "cap_" + "0" * 39, "cap_" + "0" * 41, "CAP_" + "0" * 40, "cap_" + "G" * 40]
)
def test_what_cannot_be_a_key_has_no_canonical_form(text):
    assert canonical(text) is None


@given(st.text(max_size=60))
def test_any_text_is_canonical_or_none(text):
    form = canonical(text)
    assert form is None or canonical(form) == form


async def test_the_holder_of_a_key_is_known_by_either_spelling(db):
    """Id and name of the key are what the audit trail will say."""
    key = new_key()
    row = await stored(db, key)
    authenticator = ApiKeyAuthenticator(db)
    for text in (key.text, "e2b_" + key.text[4:]):
        principal = await authenticator.api_key(text)
        assert (principal.actor_type, principal.actor_id, principal.actor_name) == ("api_key", row.id, "laptop")
        assert principal.team_id == row.team_id


@pytest.mark.parametrize("text", ["", "nonsense", "cap_" + "0" * 40, "x" * 100_000, "\N{SNOWMAN}\0"])
async def test_any_other_text_is_refused_with_the_same_words(db, text):
    """Malformed or unknown: nothing tells them apart."""
    with pytest.raises(Unauthorized, match="unknown or was revoked"):
        await ApiKeyAuthenticator(db).api_key(text)


async def test_a_revoked_key_is_dead_at_once(db):
    """No cache stands between revoking and the next request."""
    key = new_key()
    row = await stored(db, key)
    authenticator = ApiKeyAuthenticator(db)
    await authenticator.api_key(key.text)
    await db.transaction(rows.revoke, row.team_id, row.id)
    with pytest.raises(Unauthorized):
        await authenticator.api_key(key.text)


async def test_the_key_of_a_deleted_team_has_no_team(db):
    async def make(tx):
        team, user = uuid4(), uuid4()
        await tx.execute("insert into users (id, email, name) values ($1, 'a@example.org', 'A')", user)
        await tx.execute("insert into teams (id, name, slug) values ($1, 'T', '0a0a0a-0a0a0a')", team)
        await tx.execute("insert into memberships (team_id, user_id, role) values ($1, $2, 'owner')", team, user)
        return team

    team = await db.transaction(make)
    key = new_key()
    await stored(db, key, team)
    await ApiKeyAuthenticator(db).api_key(key.text)
    await execute(db, "update teams set deleted_at = now() where id = $1", team)
    with pytest.raises(NoTeam):
        await ApiKeyAuthenticator(db).api_key(key.text)


async def test_last_use_is_written_at_most_once_a_minute(db):
    """First use: at once. Within the minute: not. After it: again."""
    key = new_key()
    await stored(db, key)
    authenticator = ApiKeyAuthenticator(db)
    query = "select last_used_at from api_keys"
    await authenticator.api_key(key.text)
    first = await execute(db, query)
    assert datetime.now(UTC) - first < timedelta(minutes=1)
    await authenticator.api_key(key.text)
    assert await execute(db, query) == first
    await execute(db, "update api_keys set last_used_at = last_used_at - interval '61 seconds'")
    await authenticator.api_key(key.text)
    assert await execute(db, query) > first


async def test_without_a_database_nobody_is_let_in(tmp_path):
    async with open_database(f"postgresql:///none?host={tmp_path}") as nowhere:
        with pytest.raises(DatabaseUnavailable):
            await ApiKeyAuthenticator(nowhere).api_key(new_key().text)
