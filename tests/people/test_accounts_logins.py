"""Accounts in use: login, one's own profile, a change of password."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from capsule import control, errors
from capsule.auth.passwords import Passwords
from tests.fixtures.people import PASSWORD, quick_settings
from tests.people.together import at_once, refusal


async def log_in(people, email="ada@example.com", password=PASSWORD):
    return await people.nobody.post("/v1/auth/login", {"email": email, "password": password})


async def test_login(people):
    """By the address in whatever case; it is stored, and shown, in small letters."""
    ada = await people.sign_up("Ada", email="Ada@example.com")
    answer = await log_in(people, "aDA@EXAMPLE.COM")
    assert answer.status_code == 200
    assert answer.json() | {"token": ""} == {
        "token": "",
        "user_id": ada.wire_id,
        "team_id": f"team-{ada.team}",
        "email": "ada@example.com",
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
    await people.sign_up("Ada", email="ada@example.com")
    bob = await people.sign_up("Bob")
    answers = await at_once(partial(log_in, people, password=f"guess number {n}") for n in range(30))
    assert sorted(answer.status_code for answer in answers) == [401] * 20 + [429] * 10
    assert len(verifications) == 20
    late = await log_in(people)
    refusal(late, 429, "rate_limited")
    assert 0 < int(late.headers["Retry-After"]) <= 600
    assert (await log_in(people, bob.email)).status_code == 200


async def test_a_guesser_locks_out_nobody_else(people):
    """Twenty wrong ones from one address: that address has to wait, others do not; until guesses from everywhere have
    become too many, whatever the password is then. Of another account they are none."""
    limits = "login_account=20/3600,login_anywhere=25/3600"
    accounts = control._people(quick_settings(rate_limits=limits), people.world.db).accounts
    ada, bob = [await people.sign_up(name) for name in ("Ada", "Bob")]

    async def outcome(address, password, email=ada.email):
        try:
            await accounts.log_in(email=email, password=password, address=address)
        except (errors.Unauthorized, errors.RateLimited) as err:
            return type(err)
        return "in"

    guesses = [await outcome("192.0.2.1", "wrong password") for _ in range(20)]
    assert guesses == [errors.Unauthorized] * 20
    assert await outcome("192.0.2.1", PASSWORD) is errors.RateLimited
    assert await outcome("198.51.100.1", PASSWORD) == "in"
    many = [await outcome(f"203.0.113.{number}", "wrong password") for number in range(5)]
    assert many == [errors.Unauthorized] * 4 + [errors.RateLimited]
    assert await outcome("198.51.100.1", PASSWORD) is errors.RateLimited
    assert await outcome("192.0.2.1", PASSWORD, bob.email) == "in"


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
