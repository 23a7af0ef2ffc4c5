"""A provider that is slow, down, or answers rubbish: the browser comes back with `exchange_failed`, soon, and nobody is
registered."""

from __future__ import annotations

import gzip

import pytest
import structlog
import trio

from capsule.people import oauth
from capsule.people.providers import answers
from tests.fixtures.github import CLIENT_ID, CLIENT_SECRET, Answer, json
from tests.fixtures.people import quick_settings
from tests.people.browsers import Browser

TOKEN, USER, EMAILS = "/login/oauth/access_token", "/user", "/user/emails"
GOOD_TOKEN = {"access_token": "gho_x", "token_type": "bearer"}
GOOD_EMAIL = {"email": "a@example.com", "primary": True, "verified": True}


@pytest.fixture
async def people_settings(github):
    return quick_settings(
        public_url="https://capsule.example",
        github_client_id=CLIENT_ID,
        github_client_secret=CLIENT_SECRET,
        github_url=github.url,
        github_api_url=github.url,
    )


@pytest.fixture
def browser(people):
    return Browser(people)


@pytest.fixture
def ada(github):
    return github.account(1815, "ada", email="ada@example.com")


async def nobody_registered(people):
    rows = await people.sql("select (select count(*) from users) + (select count(*) from login_codes) as made")
    return rows[0]["made"] == 0


RUBBISH = {
    "no JSON": Answer(b"<html>It works!</html>"),
    "nothing": Answer(b""),
    "no UTF-8": Answer(b'{"login": "\xff\xfe"}'),
    "a list of lists": Answer(b"[" * 20_000),
    "null": json(None),
    "a number": json(7),
    "another object": json({"message": "hello"}),
    "an error": json({"message": "Bad credentials"}, 401),
    "a failure": Answer(b"upstream", 502),
    "a redirect": Answer(b"", 302, {"Location": "http://127.0.0.1:1/"}),
    "more than anybody needs": Answer(b" " * 4096, chunks=1 + answers.MAX_ANSWER // 4096),
}


GOOD_USER = {"id": 5, "login": "five"}


@pytest.mark.parametrize("kind", ["plain", "redirected", "too long", "compressed", "created"])
async def test_a_good_answer_that_does_not_come_as_agreed(people, github, browser, ada, kind):
    """What it says would do; that it is too long, elsewhere, packed, or with another status than 200 is enough."""
    good = json(GOOD_USER)
    github.answers["/moved"] = good
    github.answers[USER] = {
        "plain": good,
        "redirected": Answer(b"", 302, {"Location": "/moved"}),
        "too long": json({**GOOD_USER, "padding": "x" * answers.MAX_ANSWER}),
        "compressed": Answer(gzip.compress(good.body), headers={"Content-Encoding": "gzip"}),
        "created": Answer(good.body, 201),
    }[kind]
    said = await browser.agree(github, ada)
    assert said == {"error": "exchange_failed"} if kind != "plain" else "code" in said


WRONG = [
    (TOKEN, {"error": "bad_verification_code", "error_description": "…"}),
    (TOKEN, {"error": "bad_verification_code", **GOOD_TOKEN}),
    (TOKEN, {"access_token": ""}),
    (TOKEN, {"access_token": "a\r\nX-Header: 1"}),
    (TOKEN, {"access_token": ["gho_x"]}),
    (USER, {"id": "1", "login": "x"}),
    (USER, {"id": 0, "login": "x"}),
    (USER, {"id": 1.5, "login": "x"}),
    (USER, {"id": True, "login": "x"}),
    (USER, {"id": 1, "login": ""}),
    (USER, {"id": 1, "login": "\u200b"}),
    (USER, {"id": 1, "login": "x", "name": 5}),
    (USER, {"id": 1, "login": "x", "email": {"a": 1}}),
    (EMAILS, []),
    (EMAILS, GOOD_EMAIL),
    (EMAILS, [{**GOOD_EMAIL, "verified": "true"}]),
    (EMAILS, [{**GOOD_EMAIL, "verified": 1}]),
    (EMAILS, [{"email": "a@example.com", "primary": True}]),
    (EMAILS, [{**GOOD_EMAIL, "email": "no address"}]),
    (EMAILS, [{**GOOD_EMAIL, "email": "a\u0000@example.com"}]),
    (EMAILS, [{**GOOD_EMAIL, "email": "a" * 1000 + "@example.com"}]),
]


@pytest.mark.parametrize("path", [TOKEN, USER, EMAILS])
async def test_rubbish(people, github, browser, ada, path):
    """Whichever of the three questions it answers. No secret of the exchange gets into the log."""
    with structlog.testing.capture_logs() as events:
        for kind, answer in RUBBISH.items():
            github.answers[path] = answer
            assert await browser.agree(github, ada) == {"error": "exchange_failed"}, kind
    assert await nobody_registered(people)
    logged = str(events)
    hidden = [form[name] for _, _, form in github.seen for name in form.keys() & {"code", "code_verifier"}]
    hidden += [headers["authorization"].split()[1] for _, headers, _ in github.seen if "authorization" in headers]
    assert not [text for text in (CLIENT_SECRET, *hidden) if text in logged]


@pytest.mark.parametrize("path", [TOKEN, USER, EMAILS])
async def test_an_answer_of_the_wrong_kind(people, github, browser, ada, path):
    """JSON, but not what it should be; a refusal with status 200, as GitHub sends it."""
    for where, value in WRONG:
        if where == path:
            github.answers[path] = json(value)
            assert await browser.agree(github, ada) == {"error": "exchange_failed"}, value
    assert await nobody_registered(people)


async def test_another_code_than_the_providers(people, github, browser, ada):
    """Made up, spent, of another sign-in (PKCE), or endless."""
    _, state = github.authorize(await browser.leave(), ada)
    assert await browser.come_back(code="made-up", state=state) == {"error": "exchange_failed"}
    code, state = github.authorize(await browser.leave(), ada)
    assert "code" in await browser.come_back(code=code, state=state)
    _, state = github.authorize(await browser.leave(), ada)
    assert await browser.come_back(code=code, state=state) == {"error": "exchange_failed"}
    stolen, _ = github.authorize(await Browser(people).leave(), ada)
    _, state = github.authorize(await browser.leave(), ada)
    assert await browser.come_back(code=stolen, state=state) == {"error": "exchange_failed"}
    _, state = github.authorize(await browser.leave(), ada)
    before = len(github.seen)
    assert await browser.come_back(code="c" * 3000, state=state) == {"error": "exchange_failed"}
    assert len(github.seen) == before


@pytest.mark.parametrize("path", [TOKEN, USER, EMAILS])
async def test_one_that_never_answers(people, github, browser, ada, monkeypatch, path):
    """Given up after the deadline, which all questions share."""
    monkeypatch.setattr(oauth, "PROVIDER_DEADLINE", 0.4)
    github.answers[path] = trio.sleep_forever
    with trio.fail_after(9):
        assert await browser.agree(github, ada) == {"error": "exchange_failed"}
    assert await nobody_registered(people)


async def test_one_that_answers_byte_by_byte(people, github, browser, ada, monkeypatch):
    """Each byte in time, all together not."""
    monkeypatch.setattr(oauth, "PROVIDER_DEADLINE", 0.4)
    github.answers[USER] = Answer(b" ", pause=0.05, chunks=1000)
    with trio.fail_after(9):
        assert await browser.agree(github, ada) == {"error": "exchange_failed"}


async def test_a_slow_one_delays_nobody_else(people, github, browser, ada, monkeypatch):
    """While one sign-in waits for the provider, other requests are answered."""
    arrived, go_on = trio.Event(), trio.Event()

    async def hold():
        arrived.set()
        await go_on.wait()

    github.answers[USER] = hold
    said = []
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:

            async def agree():
                said.append(await browser.agree(github, ada))

            nursery.start_soon(agree)
            await arrived.wait()
            assert (await people.client.get("/health")).status_code == 200
            go_on.set()
    assert "code" in said[0]


async def test_one_that_hangs_up(people, github, browser, ada):
    """Without a word, or in the middle of one."""

    async def hang_up():
        await trio.lowlevel.checkpoint()
        raise trio.BrokenResourceError

    for answer in (hang_up, Answer(b"{", headers={"Content-Length": "9"})):
        github.answers[TOKEN] = answer
        assert await browser.agree(github, ada) == {"error": "exchange_failed"}
    assert await nobody_registered(people)
