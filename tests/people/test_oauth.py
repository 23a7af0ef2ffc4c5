"""Signing in through GitHub, against a stand-in that speaks its three endpoints over HTTP."""

from __future__ import annotations

import time
from functools import partial
from uuid import UUID, uuid4

import pytest
import structlog
import trio

from capsule.db.queries import users
from capsule.people.oauth_states import OAuthStates
from tests.fixtures.github import CLIENT_ID, CLIENT_SECRET
from tests.fixtures.people import quick_settings
from tests.people.browsers import CALLBACK, EXCHANGE, START, Browser


@pytest.fixture
async def people_settings(github):
    return quick_settings(
        public_url="https://capsule.example/",
        github_client_id=CLIENT_ID,
        github_client_secret=CLIENT_SECRET,
        github_url=github.url,
        github_api_url=f"{github.url}/",
    )


@pytest.fixture
def browser(people):
    return Browser(people)


@pytest.fixture
def ada(github):
    return github.account(1815, "ada", name="Ada Lovelace", email="Ada@example.com")


async def counts(people):
    """How many accounts, identities, teams with an owner, login codes."""
    [row] = await people.sql(
        """select (select count(*) from users) as users, (select count(*) from oauth_identities) as identities,
                  (select count(*) from memberships where role = 'owner' and is_default) as teams,
                  (select count(*) from login_codes) as codes"""
    )
    return row["users"], row["identities"], row["teams"], row["codes"]


async def test_somebody_new_gets_an_account_with_its_own_team(people, github, browser, ada):
    """One account, one team they own, one audit row; the token works and says who they are."""
    auth = await browser.sign_in(github, ada)
    assert (auth["email"], auth["name"]) == ("ada@example.com", "Ada Lovelace")
    person = people.person(auth)
    me = (await person.get("/v1/me")).json()
    assert (me["email"], me["role"]) == ("ada@example.com", "owner")
    assert [(name, kind, action) for name, kind, action, *_ in await people.audit(person.team)] == [
        ("ada@example.com", "team", "create")
    ]
    assert await counts(people) == (1, 1, 1, 1)


async def test_a_known_identity_signs_in_by_its_id(people, github, browser, ada):
    """Whatever it calls itself by now, and whatever its address is: the same account, unchanged."""
    first = await browser.sign_in(github, ada)
    renamed = github.account(1815, "countess", name="Augusta", email="augusta@example.com")
    second = await Browser(people).sign_in(github, renamed)
    assert (second["user_id"], second["email"], second["name"]) == (first["user_id"], "ada@example.com", "Ada Lovelace")
    assert (await counts(people))[:3] == (1, 1, 1)


async def test_a_known_identity_needs_no_address(people, github, browser, ada):
    """It signs in when its address is not verified any more, is none of ours, or is gone; somebody new does not."""
    first = await browser.sign_in(github, ada)
    for changed in (
        github.account(1815, "ada", email="ada@example.com", verified=False),
        github.account(1815, "ada", email="other@example.com", primary=False),
        github.account(1815, "ada", email="\u0130@example.com"),
        github.account(1815, "ada"),
    ):
        again = await Browser(people).sign_in(github, changed)
        assert (again["user_id"], again["email"]) == (first["user_id"], "ada@example.com")
    assert await Browser(people).agree(github, github.account(2, "eve")) == {"error": "exchange_failed"}
    assert (await counts(people))[:3] == (1, 1, 1)


async def test_another_identity_with_a_known_address_is_told_so(people, github, browser, ada):
    """An account is never linked silently: neither one with a password, nor one of another identity."""
    await people.sign_up("Ada", email="ada@EXAMPLE.com")
    assert await browser.agree(github, ada) == {"error": "email_taken"}
    grace = github.account(1, "grace", email="grace@example.com")
    await browser.sign_in(github, grace)
    imposter = github.account(2, "grace2", email="GRACE@example.com")
    assert await browser.agree(github, imposter) == {"error": "email_taken"}
    assert (await counts(people))[:2] == (2, 1)


async def test_the_session_is_nowhere_in_a_url_and_the_cookies_are_closed(people, github, browser, ada):
    """Neither redirect may be kept or told on; no script sees a cookie, no other site brings along the strict one."""
    started = await browser.get(START)
    state = browser.attributes["capsule_oauth_state"]
    assert (state["httponly"], state["secure"], state["samesite"], state["path"], state["max-age"]) == (
        True,
        True,
        "Lax",
        "/v1/auth/oauth",
        "600",
    )
    code, returned = github.authorize(started.headers["Location"], ada)
    ended = await browser.get(CALLBACK, code=code, state=returned)
    login = browser.attributes["capsule_login"]
    assert (login["httponly"], login["secure"], login["samesite"], login["max-age"]) == (True, True, "Strict", "60")
    assert "capsule_oauth_state" not in browser.cookies
    for answer in (started, ended):
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
    [row] = await people.sql("select sha256, expires_at - created_at as life from login_codes")
    assert 60 <= row["life"].total_seconds() < 80
    assert len(row["sha256"]) == 32


async def test_an_unverified_address_is_nobodys(people, github, browser):
    """Neither as the primary one nor in the profile, however GitHub came to show it there."""
    for account in (
        github.account(1, "a", email="ceo@example.com", verified=False),
        github.account(2, "b", email="ceo@example.com", verified=False, profile="ceo@example.com"),
        github.account(3, "c", email="other@example.com", primary=False),
        github.account(4, "d"),
    ):
        assert await browser.agree(github, account) == {"error": "exchange_failed"}
    assert (await counts(people))[:2] == (0, 0)


async def test_the_profiles_address_is_taken_when_it_is_verified(people, github, browser):
    """Before the primary one; a profile's that is not verified gives way to the primary one."""
    addresses = [
        {"email": "first@example.com", "primary": True, "verified": True, "visibility": None},
        {"email": "second@example.com", "primary": False, "verified": True},
        {"email": "third@example.com", "primary": False, "verified": False},
    ]
    for number, (profile, taken) in enumerate((("Second@example.com", "second"), ("third@example.com", "first")), 1):
        account = github.account(number, "x", profile=profile)
        account.addresses = addresses
        assert (await browser.sign_in(github, account))["email"] == f"{taken}@example.com"


@pytest.mark.parametrize("name", [None, "", " \t\0\u200b", "N" * 300, "名前 \x1b[31m", "D'Arcy <b>", "\u3164\u2800"])
async def test_any_name_makes_an_account(people, github, browser, name):
    """Without characters that cannot be seen or stored, not longer than ours; without one it is the login."""
    auth = await browser.sign_in(github, github.account(7, "log-in", name=name, email="x@example.com"))
    assert 1 <= len(auth["name"]) <= 128
    assert auth["name"].isprintable()
    if not name or not name.strip():
        assert auth["name"] == "log-in"


async def test_a_denial(people, github, browser):
    """The dashboard is told; anything else that GitHub says instead of a code is a failure."""
    await browser.leave()
    assert await browser.come_back(error="access_denied", error_description="The user has denied", state="x") == {
        "error": "access_denied"
    }
    assert "capsule_oauth_state" not in browser.cookies
    assert await browser.come_back(error="application_suspended") == {"error": "exchange_failed"}
    assert github.seen == []


async def test_a_state_is_good_in_its_browser_only(people, github, browser, ada):
    """Another browser's callback, a made-up state, a cookie of another sign-in or without its signature: refused before
    GitHub hears of it."""
    code, state = github.authorize(await browser.leave(), ada)
    other = Browser(people)
    assert await other.come_back(code=code, state=state) == {"error": "invalid_state"}
    await other.leave()
    assert await other.come_back(code=code, state=state) == {"error": "invalid_state"}
    for wrong in ("", state[:-1], state + "A", "é" * 22, "A" * 22):
        assert await browser.twin().come_back(code=code, state=wrong) == {"error": "invalid_state"}
    sealed = browser.cookies["capsule_oauth_state"]
    known, expiry, mac = sealed.split(".")
    for forged in (f"{known}.{int(expiry) + 1}.{mac}", f"{known}.{expiry}.{'0' * 64}", known, "..", f"{sealed}0"):
        forger = browser.twin()
        forger.cookies["capsule_oauth_state"] = forged
        assert await forger.come_back(code=code, state=state) == {"error": "invalid_state"}
    assert github.seen == []


async def test_a_state_ends_after_ten_minutes(people, github, browser, ada):
    """A cookie that outlived its time is no proof of anything."""
    for age, said in ((601, {"error": "invalid_state"}), (540, None)):
        states = OAuthStates(people.settings, clock=lambda age=age: time.time() - age)
        location = await browser.leave()
        attempt, sealed = states.begin("github")
        browser.cookies["capsule_oauth_state"] = sealed
        code, _ = github.authorize(location, ada)
        github._grants[code].challenge = attempt.challenge
        answer = await browser.come_back(code=code, state=attempt.state)
        assert (answer == said) if said else ("code" in answer)


async def test_without_a_code(people, github, browser, ada):
    """And a parameter that comes twice is none."""
    _, state = github.authorize(await browser.leave(), ada)
    assert await browser.come_back(state=state) == {"error": "missing_code"}
    code, state = github.authorize(await browser.leave(), ada)
    assert await browser.come_back(code=[code, code], state=state) == {"error": "missing_code"}


async def test_a_state_comes_back_once(people, github, browser, ada):
    """A replayed callback finds it spent, also with a fresh code of GitHub's."""
    location = await browser.leave()
    replay = browser.twin()
    code, state = github.authorize(location, ada)
    fresh, _ = github.authorize(location, ada)
    assert "code" in await browser.come_back(code=code, state=state)
    assert await replay.come_back(code=fresh, state=state) == {"error": "invalid_state"}


async def test_of_two_callbacks_at_once_one_wins(people, github, browser, ada):
    """Both are in the database together; GitHub is asked once."""
    location = await browser.leave()
    twins = [browser.twin() for _ in range(8)]
    code, state = github.authorize(location, ada)
    said = await at_once(twins, lambda twin: twin.come_back(code=code, state=state))
    assert sorted(str(sorted(one)) for one in said) == ["['code']"] + ["['error']"] * 7
    assert [path for path, *_ in github.seen].count("/login/oauth/access_token") == 1
    assert await counts(people) == (1, 1, 1, 1)


async def test_of_registrations_of_one_identity_at_once_one_registers(people, github, ada):
    """Those that lose are logins: every browser is signed in to the one account."""
    arrived = Gate(6)
    github.answers["/user/emails"] = arrived.wait
    browsers = [Browser(people) for _ in range(6)]
    auths = await at_once(browsers, lambda browser: browser.sign_in(github, ada))
    assert len({auth["user_id"] for auth in auths}) == 1
    assert await counts(people) == (1, 1, 1, 6)


async def test_of_two_identities_with_one_address_at_once_one_registers(people, github):
    """The other is told that it is taken; nothing of its registration is left."""
    arrived = Gate(2)
    github.answers["/user/emails"] = arrived.wait
    accounts = [github.account(number, f"n{number}", email="shared@example.com") for number in (1, 2)]
    said = await at_once(accounts, lambda account: Browser(people).agree(github, account))
    assert sorted(str(one.get("error", "code")) for one in said) == ["code", "email_taken"]
    assert await counts(people) == (1, 1, 1, 1)


async def test_a_code_is_spent_once(people, github, browser, ada):
    """Of exchanges at once one gets the session; later ones nothing."""
    said = await browser.agree(github, ada)
    twins = [browser.twin() for _ in range(6)]
    answers = await at_once(twins, lambda twin: twin.exchange(said["code"]))
    assert sorted(answer.status_code for answer in answers) == [200] + [401] * 5
    assert (await browser.exchange(said["code"])).status_code == 401


async def test_a_code_is_good_in_its_browser_only(people, github, browser, ada):
    """A link with somebody else's code signs nobody in, and does not spend it."""
    said = await browser.agree(github, ada)
    other = Browser(people)
    assert (await other.exchange(said["code"])).status_code == 401
    await other.agree(github, github.account(9, "eve", email="eve@example.com"))
    assert (await other.exchange(said["code"])).status_code == 401
    for nonsense in ("x", said["code"][:-1], said["code"] + ".", "é" * 43):
        assert (await browser.exchange(nonsense)).status_code == 401
    assert (await browser.exchange(said["code"])).status_code == 200


async def test_a_code_ends_after_a_minute(people, github, browser, ada):
    """By the database's clock."""
    said = await browser.agree(github, ada)
    await people.sql("update login_codes set expires_at = now()")
    assert (await browser.exchange(said["code"])).status_code == 401


async def test_a_code_ends_with_the_sessions(people, github, browser, ada):
    """Who changes the password has ended what was on its way, too."""
    said = await browser.agree(github, ada)
    await people.sql("update users set sessions_valid_from = clock_timestamp()")
    assert (await browser.exchange(said["code"])).status_code == 401


async def test_a_code_while_the_sessions_end(people, github, browser, ada, overtake, queued):
    """The password is changed between the look at the code and the session: none outlives that."""
    said = await browser.agree(github, ada)
    [row] = await people.sql("select id from users")

    async def change(tx):
        await users.lock(tx, row["id"])
        await users.set_password(tx, row["id"], "another", kept_session=uuid4())

    db = people.world.db
    overtaking = overtake(partial(queued, db, partial(db.transaction, change)), after="update login_codes")
    answer = await browser.exchange(said["code"])
    await queued.done()
    assert overtaking.done
    if answer.status_code == 200:
        assert (await people.person(answer.json()).get("/v1/me")).status_code == 401


async def test_a_session_lands_where_a_login_does(people, github, browser, ada):
    """In the default team while it lives, then in another, then in none."""
    first = await browser.sign_in(github, ada)
    team = UUID(first["team_id"].removeprefix("team-"))
    await people.sql("update teams set deleted_at = now() where id = $1", team)
    assert (await browser.sign_in(github, ada))["team_id"] == ""


async def test_a_provider_that_is_not(people, github, browser):
    """404 where one starts; the callback redirects even so, and so it does for any nonsense."""
    for name in ("gitlab", "GitHub", "exchange", "%00", "é"):
        answer = await browser.get(f"/v1/auth/oauth/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "provider_not_found")
        answer = await browser.get(f"/v1/auth/oauth/{name}/callback", code="x", state="y")
        assert answer.headers["Location"] == "https://capsule.example/login?error=invalid_state"
    for query in ("", "?", "code=%FF&state=%00", "a=1&" * 100, "error=%0d%0aX:1", "code[]=1;state=2"):
        answer = await people.client.get(f"{CALLBACK}?{query}")
        assert answer.status_code == 302
        assert answer.headers["Location"].startswith("https://capsule.example/login?error=")


async def test_starts_and_exchanges_are_limited_by_address(people, browser):
    """429 with Retry-After once an address has had its share."""
    await people.sql(
        """insert into rate_limits (bucket, window_start, hits)
           select 'oauth_address:127.0.0.1', to_timestamp(floor(extract(epoch from now()) / 300) * 300), 100"""
    )
    for answer in (await browser.get(START), await browser.post(EXCHANGE, {"code": "x"})):
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1


async def test_the_database_away_is_an_internal_error(people, github, browser, ada, monkeypatch):
    """The browser is sent back all the same, and what went wrong is in our log, without the code."""
    code, state = github.authorize(await browser.leave(), ada)
    await people.sql("drop table login_codes")
    with structlog.testing.capture_logs() as events:
        assert await browser.come_back(code=code, state=state) == {"error": "internal_error"}
    assert "oauth_failed" in {event["event"] for event in events}
    assert code not in str(events)


class Gate:
    """Holds everybody until as many have come as were expected."""

    def __init__(self, expected):
        self._left = expected
        self._open = trio.Event()

    async def wait(self):
        self._left -= 1
        if self._left <= 0:
            self._open.set()
        with trio.fail_after(20):
            await self._open.wait()


async def at_once(items, action):
    """What each came to, in order."""
    results = [None] * len(items)

    async def one(index, item):
        results[index] = await action(item)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for index, item in enumerate(items):
                nursery.start_soon(one, index, item)
    return results
