"""Accounts as their holders see them: sign-up, login, one's own profile, a change of password."""

from __future__ import annotations

import re
from functools import partial

import pytest
import trio
from argon2 import PasswordHasher
from hypothesis import given
from hypothesis import strategies as st

from capsule import control, errors
from capsule.auth.passwords import Passwords
from capsule.people.registration import default_team_name, email_address
from tests.fixtures.people import PASSWORD, quick_settings

ADA = {"email": "ada@example.com", "password": PASSWORD, "name": "Ada"}
TEAM_NAME = re.compile(r"[A-Za-z0-9 _\-@']{1,128}")


@pytest.fixture
def verifications(monkeypatch):
    """The hashes that passwords are compared with, one for each time."""
    seen = []
    real = PasswordHasher.verify

    def verify(self, hash, password):  # noqa: A002 - the library's name
        seen.append(hash)
        return real(self, hash, password)

    monkeypatch.setattr(PasswordHasher, "verify", verify)
    return seen


async def at_once(requests):
    """The answers to requests sent together."""
    answers = []

    async def send(request):
        answers.append(await request())

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(send, request)
    return answers


def refusal(answer, status, code):
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    return answer.json()["error"]


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


def test_an_address_in_normal_form():
    """The domain in small letters, the rest as it was."""
    assert email_address("Ada.L@EXAMPLE.com") == "Ada.L@example.com"


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


async def test_a_sign_up_sent_many_times_at_once(people):
    """One account, and each gets a session of it."""
    answers = await at_once(partial(sign_up_with_key, people) for _ in range(8))
    assert {answer.status_code for answer in answers} == {201}
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


async def log_in(people, email=ADA["email"], password=PASSWORD):
    return await people.nobody.post("/v1/auth/login", {"email": email, "password": password})


async def test_login(people):
    """By the address in whatever case."""
    ada = await people.sign_up("Ada", email="Ada@example.com")
    answer = await log_in(people, "aDA@EXAMPLE.COM")
    assert answer.status_code == 200
    assert answer.json() | {"token": ""} == {
        "token": "",
        "user_id": ada.wire_id,
        "team_id": f"team-{ada.team}",
        "email": "Ada@example.com",
        "name": "Ada",
    }


async def test_every_failed_login_is_alike(people, verifications):
    """Unknown address, no address at all, no password, a wrong one: the same words and one verification of the same
    cost each; and one row of the audit trail each, where a known person would have landed."""
    ada = await people.sign_up("Ada")
    bob = await people.sign_up("Bob")
    await people.sql("update users set password_hash = null where id = $1", bob.id)
    refusals = []
    for email, password in (
        (ada.email, "wrong password"),
        (ada.email, ""),
        (bob.email, PASSWORD),
        ("nobody@example.com", PASSWORD),
        ("no address", PASSWORD),
    ):
        error = refusal(await log_in(people, email, password), 401, "unauthorized")
        error.pop("request_id")
        refusals.append(error)
    assert all(error == refusals[0] for error in refusals)
    assert len(verifications) == 5
    assert len({stored.rsplit("$", 2)[0] for stored in verifications}) == 1, "they cost the same"
    rows = await people.sql("""
        select team_id, actor_id, actor_name, resource_type, resource_id, scope, status, metadata::text
        from audit_logs where action = 'login_failed' order by created_at
    """)
    who = [(row["team_id"], row["actor_id"], row["actor_name"], row["resource_id"]) for row in rows]
    assert who == [
        *[(ada.team, ada.id, ada.email, ada.wire_id)] * 2,
        (bob.team, bob.id, bob.email, bob.wire_id),
        *[(None, None, "", "")] * 2,
    ]
    kinds = {(row["resource_type"], row["scope"], row["status"], row["metadata"]) for row in rows}
    assert kinds == {("auth", "admin", "warning", '{"address": "127.0.0.1"}')}


async def test_guesses_made_at_once_are_counted_before(people, verifications):
    """Thirty at one account, at the same time: twenty are looked at, the others are told when to come back, the right
    password with them; and other accounts are not held up."""
    await people.sign_up("Ada", email=ADA["email"])
    bob = await people.sign_up("Bob")
    answers = await at_once(partial(log_in, people, password=f"guess number {n}") for n in range(30))
    assert sorted(answer.status_code for answer in answers) == [401] * 20 + [429] * 10
    assert len(verifications) == 20
    late = await log_in(people)
    refusal(late, 429, "rate_limited")
    assert 0 < int(late.headers["Retry-After"]) <= 600
    assert (await log_in(people, bob.email)).status_code == 200


async def test_limits_by_address(people):
    """Sign-ups and logins each, whatever the account is; another control plane knows."""
    strict = quick_settings(rate_limits="sign_up=2/3600,login_address=2/3600,password=1/3600")
    one, other = [control._people(strict, people.world.db).accounts for _ in range(2)]

    def sign_up(accounts, name, address="192.0.2.1"):
        return accounts.sign_up(
            email=f"{name}@example.com", password=PASSWORD, name=name, address=address, idempotency_key=None
        )

    await sign_up(one, "a")
    await sign_up(other, "b")
    with pytest.raises(errors.RateLimited):
        await sign_up(one, "c")
    await sign_up(one, "c", "2001:db8::1")
    await sign_up(other, "d", "2001:db8::2")
    with pytest.raises(errors.RateLimited):
        await sign_up(one, "e", "2001:db8::3")
    for name in "ab":
        await one.log_in(email=f"{name}@example.com", password=PASSWORD, address="192.0.2.1")
    with pytest.raises(errors.RateLimited):
        await other.log_in(email="c@example.com", password=PASSWORD, address="192.0.2.1")


async def test_where_a_login_lands(people):
    """The default team; when that was deleted the first one joined that lives; then none."""
    ada, bob, eve = [await people.sign_up(name) for name in ("Ada", "Bob", "Eve")]
    await people.join(eve.team, ada)
    await people.join(bob.team, ada)
    await people.sql("update memberships set joined_at = now() - interval '1 day' where team_id = $1", eve.team)

    async def landing():
        return (await log_in(people, ada.email)).json()["team_id"]

    delete = "update teams set deleted_at = now() where id = $1"
    assert await landing() == f"team-{ada.team}"
    await people.sql(delete, ada.team)
    assert await landing() == f"team-{eve.team}"
    await people.sql(delete, eve.team)
    assert await landing() == f"team-{bob.team}"
    await people.sql(delete, bob.team)
    assert not await landing()
    lost = people.person((await log_in(people, ada.email)).json())
    me = (await lost.get("/v1/me")).json()
    assert "team_id" not in me
    assert "role" not in me
    refusal(await lost.get("/v1/sandboxes"), 403, "no_team")


async def test_a_hash_of_another_cost_is_made_again(people):
    """At login with the right password only, even at two at once; the password stays."""
    ada = await people.sign_up("Ada")
    dearer = control._people(quick_settings(argon2_memory_kib=16), people.world.db).accounts
    stored = "select password_hash from users where id = $1"
    [before] = await people.sql(stored, ada.id)
    with pytest.raises(errors.Unauthorized):
        await dearer.log_in(email=ada.email, password="wrong password", address="")
    assert await people.sql(stored, ada.id) == [before]
    await at_once(partial(dearer.log_in, email=ada.email, password=PASSWORD, address="") for _ in range(4))
    [after] = await people.sql(stored, ada.id)
    assert "m=8," in before["password_hash"]
    assert "m=16," in after["password_hash"]
    assert (await ada.get("/v1/me")).status_code == 200, "a rehash ends no session"
    assert (await log_in(people, ada.email)).status_code == 200


async def test_a_damaged_hash_is_nobodys(people, verifications):
    """Costs what others cost."""
    ada = await people.sign_up("Ada")
    await people.sql("update users set password_hash = 'rubbish' where id = $1", ada.id)
    refusal(await log_in(people, ada.email), 401, "unauthorized")
    assert verifications[-1].startswith("$argon2id$")


async def test_profile(people):
    """One's own name; nothing else, and nobody else's."""
    ada, bob = [await people.sign_up(name) for name in ("Ada", "Bob")]
    answer = await ada.patch("/v1/me", {"name": "Countess"})
    assert answer.status_code == 200
    assert answer.json()["name"] == "Countess"
    assert (await ada.patch("/v1/me", {})).json() == (await ada.get("/v1/me")).json() == answer.json()
    for body in ({"email": "x@example.com"}, {"is_admin": True}, {"name": ""}, {"name": None}):
        refusal(await ada.patch("/v1/me", body), 400, "invalid_request")
    assert (await bob.get("/v1/me")).json()["name"] == "Bob"


async def test_a_platform_admin_sees_what_they_may(people):
    """As the database says at the moment."""
    ada = await people.sign_up("Ada")
    await people.make_admin(ada, "hosts", "byoc")
    assert (await ada.get("/v1/me")).json()["permissions"] == ["hosts", "byoc"]
    await people.sql("update users set is_admin = false where id = $1", ada.id)
    assert "permissions" not in (await ada.get("/v1/me")).json()


async def change(person, current, new):
    body = {"new_password": new} if current is None else {"current_password": current, "new_password": new}
    return await person.post("/v1/me/password", body)


async def test_a_wrong_current_password_changes_nothing(people):
    """403, or 400 for a new one that is none; other sessions go on."""
    ada = await people.sign_up("Ada")
    other = people.person((await log_in(people, ada.email)).json())
    refusal(await change(ada, "wrong password", "another password"), 403, "forbidden")
    refusal(await change(ada, None, "another password"), 403, "forbidden")
    refusal(await change(ada, PASSWORD, "short"), 400, "invalid_request")
    refusal(await change(ada, PASSWORD, "é" * 513), 400, "invalid_request")
    assert (await other.get("/v1/me")).status_code == 200
    assert (await log_in(people, ada.email)).status_code == 200


async def test_guessing_by_changes_is_limited(people):
    """Who found an open session does not try passwords there."""
    ada = await people.sign_up("Ada")
    answers = [await change(ada, f"guess number {n}", "another password") for n in range(11)]
    assert [answer.status_code for answer in answers] == [403] * 10 + [429]


async def test_a_first_password(people):
    """Who signs in through a provider sets one without an old one; then there is an old one."""
    ada = await people.sign_up("Ada")
    await people.sql("update users set password_hash = null where id = $1", ada.id)
    assert (await ada.get("/v1/me")).json()["has_password"] is False
    refusal(await change(ada, PASSWORD, "another password"), 403, "forbidden")
    answers = await at_once(partial(change, ada, None, f"another password {n}") for n in range(4))
    # One is first; who comes later is told in one of two ways, by when they looked.
    assert {answer.status_code for answer in answers} <= {204, 401, 403}
    assert len([answer for answer in answers if answer.status_code == 204]) == 1
    assert (await ada.get("/v1/me")).json()["has_password"] is True


async def test_too_many_at_once_are_told_so(people):
    """A bounded number waits for the few threads; nobody hangs."""
    passwords = Passwords(quick_settings(argon2_memory_kib=4096, argon2_time_cost=3, password_threads=1))
    results = []

    async def hash_one():
        try:
            results.append(await passwords.hash(PASSWORD))
        except errors.Busy as err:
            results.append(err.retry_after)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(80):
                nursery.start_soon(hash_one)
    assert len([result for result in results if isinstance(result, str)]) == 65
    assert [result for result in results if not isinstance(result, str)] == [2.0] * 15
