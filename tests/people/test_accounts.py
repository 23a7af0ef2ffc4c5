"""Accounts begin: sign-up, once and only once."""

from __future__ import annotations

import asyncio
import re
import threading
import unicodedata
from functools import partial

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from capsule.db.queries import idempotency, users
from capsule.people.registration import default_team_name, email_address, small_letters
from tests.fixtures.people import PASSWORD
from tests.people.together import at_once, refusal

ADA = {"email": "ada@example.com", "password": PASSWORD, "name": "Ada"}
TEAM_NAME = re.compile(r"[A-Za-z0-9 _\-@']{1,128}")


async def test_sign_up(people):
    """An account, its own team and the membership, in one go; the session is for that team."""
    answer = await people.nobody.post("/v1/auth/signup", ADA)
    assert answer.status_code == 201
    auth = answer.json()
    assert sorted(auth) == ["email", "name", "team_id", "token", "user_id"]
    assert (auth["email"], auth["name"]) == ("ada@example.com", "Ada")
    ada = people.person(auth)
    me = (await ada.get("/v1/me")).json()
    assert me.pop("created_at").endswith("Z")
    assert me == {
        "user_id": auth["user_id"],
        "email": "ada@example.com",
        "name": "Ada",
        "has_password": True,
        "team_id": auth["team_id"],
        "role": "owner",
    }
    [team] = await people.sql(
        "select name, is_default from teams join memberships on team_id = id where id = $1", ada.team
    )
    assert dict(team) == {"name": "Ada's Team", "is_default": True}
    assert await people.audit(ada.team) == [("ada@example.com", "team", "create", "success", {})]


async def test_fifty_sign_up_with_one_address(people):
    """However it is written: one account with one team, and 49 that are told."""
    answers = await at_once(
        partial(people.nobody.post, "/v1/auth/signup", {**ADA, "email": "ADA@example.com" if n % 2 else ADA["email"]})
        for n in range(50)
    )
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 49
    for answer in answers:
        if answer.status_code == 409:
            refusal(answer, 409, "email_taken")
    [counts] = await people.sql("""
        select (select count(*) from users) as users, (select count(*) from memberships) as memberships,
          (select count(*) from teams where name = 'Ada''s Team') as teams, (select count(*) from audit_logs) as rows
    """)
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("password", "1234567"),
        ("password", "é" * 513),
        ("password", "x" * 1025),
        ("password", None),
        ("email", "ada"),
        ("email", "a b@example.com"),
        ("email", "ada@exa mple.com"),
        ("email", "ada@-x.com"),
        ("email", "ada\u0000@example.com"),
        ("email", "a" * 300 + "@example.com"),
        ("email", "ada@" + "x" * 400),
        ("email", '"ada lovelace"@example.com'),
        ("email", "Ada <ada@example.com>"),
        ("email", "ada@[127.0.0.1]"),
        ("email", "\u0130da@example.com"),
        ("name", ""),
        ("name", "  "),
        ("name", "a\nb"),
        ("name", "Ada\n"),
        ("name", "a\u0000"),
        ("name", "a" * 129),
        ("extra", "1"),
    ],
)
async def test_what_is_no_account(people, field, value):
    """Is refused by name, and nothing is written."""
    answer = await people.nobody.post("/v1/auth/signup", {**ADA, field: value})
    assert refusal(answer, 400, "invalid_request")["field"] == field
    assert not await people.sql("select from users")


@pytest.mark.parametrize(
    "email", ["ada@server", "ada@corp.internal", "ada@x.test", "ada@box.local", "ada@localhost", "ädä@example.com"]
)
async def test_addresses_of_ones_own_network(people, email):
    """Who runs this for themselves signs up with what they have."""
    assert (await people.nobody.post("/v1/auth/signup", {**ADA, "email": email})).status_code == 201


async def test_passwords_of_any_letters(people):
    """1024 bytes in UTF-8, composed this way or that: it is the same password later."""
    password = "é\n" + "x" * 1021
    assert (await people.nobody.post("/v1/auth/signup", {**ADA, "password": password})).status_code == 201
    decomposed = {"email": ADA["email"], "password": password.replace("é", "e\u0301")}
    assert (await people.nobody.post("/v1/auth/login", decomposed)).status_code == 200
    cut = {"email": ADA["email"], "password": password[:-1]}
    refusal(await people.nobody.post("/v1/auth/login", cut), 401, "unauthorized")


@given(st.text(max_size=140))
def test_a_default_team_has_a_name(name):
    """Whatever its owner is called."""
    assert TEAM_NAME.fullmatch(default_team_name(name))


@pytest.mark.parametrize(
    ("name", "team"),
    [("Ada", "Ada's Team"), ("José Ñandú", "Jose Nandu's Team"), ("李", "My Team"), ("<b>x</b>", "bxb's Team")],
)
def test_names_of_default_teams(name, team):
    """Accents go, the rest that does not fit is dropped."""
    assert default_team_name(name) == team


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        ("Ada.L@EXAMPLE.com", "ada.l@example.com"),
        ("\u00dcnal@example.com", "\u00fcnal@example.com"),
        ("U\u0308nal@example.com", "\u00fcnal@example.com"),
        ("\u212aelvin@\u00c5.example", "kelvin@\u00e5.example"),
        ("\u039f\u0394\u039f\u03a3@example.com", "\u03bf\u03b4\u03bf\u03c2@example.com"),
        ("ada@XN--BCHER-KVA.example", "ada@b\u00fccher.example"),
    ],
)
def test_an_address_in_its_one_form(typed, stored):
    """Composed, and in small letters, of whatever alphabet."""
    assert email_address(typed) == email_address(stored) == stored


@given(st.text(max_size=40))
def test_small_letters_are_a_form_to_go_by(text):
    """Made again they are the same, however the text is written."""
    small = small_letters(text)
    if small is not None:
        assert small_letters(small) == small
        assert small_letters(unicodedata.normalize("NFD", text)) == small


async def sign_up_with_key(people, key="k1", **changes):
    return await people.nobody.post("/v1/auth/signup", {**ADA, **changes}, headers={"Idempotency-Key": key})


async def test_a_sign_up_sent_again(people):
    """With the password: the same account, another session. With another password or name: 409, no session."""
    first, again = [await sign_up_with_key(people) for _ in range(2)]
    assert first.status_code == again.status_code == 201
    assert first.json()["user_id"] == again.json()["user_id"]
    assert first.json()["token"] != again.json()["token"]
    assert (await people.person(again.json()).get("/v1/me")).status_code == 200
    refusal(await sign_up_with_key(people, password="not the password"), 409, "idempotency_key_reused")
    refusal(await sign_up_with_key(people, name="Eve"), 409, "idempotency_key_reused")
    refusal(await sign_up_with_key(people, key="k2"), 409, "email_taken")
    assert len(await people.sql("select from users")) == 1


async def test_a_sign_up_sent_again_is_a_login(people):
    """A wrong password is recorded and counted as one at login is: twenty in all, by whichever way."""
    ada = (await sign_up_with_key(people)).json()
    again = [await sign_up_with_key(people, password=f"guess number {number}") for number in range(19)]
    assert {answer.status_code for answer in again} == {409}
    guess = {"email": ADA["email"], "password": "another guess"}
    assert (await people.nobody.post("/v1/auth/login", guess)).status_code == 401
    refusal(await sign_up_with_key(people), 429, "rate_limited")
    refusal(await people.nobody.post("/v1/auth/login", guess), 429, "rate_limited")
    rows = await people.sql("""
        select resource_id, actor_name, team_id, metadata::text as said, count(*) as rows from audit_logs
        where action = 'login_failed' group by 1, 2, 3, 4
    """)
    assert [(row["resource_id"], row["actor_name"], row["rows"]) for row in rows] == [
        (ada["user_id"], ADA["email"], 20)
    ]
    assert [(f"team-{row['team_id']}", row["said"]) for row in rows] == [(ada["team_id"], '{"address": "127.0.0.1"}')]


async def test_a_sign_up_sent_many_times_at_once(people):
    """One account, and each gets a session of it."""
    answers = await at_once(partial(sign_up_with_key, people) for _ in range(8))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["user_id"] for answer in answers}) == 1


@pytest.mark.parametrize("look", [(users, "by_email"), (idempotency, "get")])
async def test_a_sign_up_while_the_same_one_commits(people, monkeypatch, look):
    """Between the two looks of the later one, or before both: it finds the account and the key, or neither."""
    module, name = look
    real, looked, committed = getattr(module, name), threading.Event(), threading.Event()

    async def held(*args):
        found = await real(*args)
        if not looked.is_set():
            looked.set()
            assert await asyncio.to_thread(committed.wait, 60)
        return found

    monkeypatch.setattr(module, name, held)

    async def overtaking():
        assert await trio.to_thread.run_sync(looked.wait, 60)
        answer = await sign_up_with_key(people)
        committed.set()
        return answer

    answers = await at_once([partial(sign_up_with_key, people), overtaking])
    assert [answer.status_code for answer in answers] == [201, 201]
    assert len({answer.json()["user_id"] for answer in answers}) == 1


async def test_nothing_quick_is_stored_of_a_password(people):
    """The row of the Idempotency-Key is the same whatever the password was."""
    await sign_up_with_key(people)
    hashes = "select request_sha256 from idempotency_keys"
    [one] = await people.sql(hashes)
    await people.sql("delete from idempotency_keys")
    await people.sql("update users set email = 'eve@example.com'")
    await sign_up_with_key(people, password="another password")
    [other] = await people.sql(hashes)
    assert one["request_sha256"] == other["request_sha256"]
    [row] = await people.sql("select password_hash from users where email = $1", ADA["email"])
    assert row["password_hash"].startswith("$argon2id$")
