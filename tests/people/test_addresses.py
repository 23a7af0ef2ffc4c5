"""One address, one account: whatever the database's locale makes of letters."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from capsule.db.migrate import migrate
from capsule.db.pool import open_database
from capsule.people.admins import Admins
from tests.fixtures.people import PASSWORD
from tests.people.together import refusal

LOCALES = {
    "ASCII": "locale_provider libc locale 'C'",  # as the embedded server has it
    "Unicode": "locale_provider builtin builtin_locale 'C.UTF-8'",  # finds `i` in `\u0130`, where we find two letters
}
UENAL = "\u00fcnal@example.com"
WRITTEN = ("\u00dcnal@example.com", "u\u0308nal@EXAMPLE.com", "U\u0308NAL@example.com")


@pytest.fixture(params=LOCALES.values(), ids=LOCALES)
async def postgres_dsn(postgres_server, request):
    """An empty database of that locale, migrated."""
    name = await trio.to_thread.run_sync(postgres_server.create, f'template0" {request.param} --')
    dsn = postgres_server.dsn(name)
    async with open_database(dsn, max_size=1) as db:
        await migrate(db)
    yield dsn
    await trio.to_thread.run_sync(postgres_server.drop, name)


async def sign_up(people, email):
    body = {"email": email, "password": PASSWORD, "name": "X"}
    return await people.nobody.post("/v1/auth/signup", body)


async def log_in(people, email, password=PASSWORD):
    return await people.nobody.post("/v1/auth/login", {"email": email, "password": password})


@pytest.mark.parametrize("first", [UENAL, *WRITTEN])
async def test_one_account_however_it_is_written(people, first):
    """Taken in every way, and found in every way: at login, as a member, in the search, by the operator."""
    auth = (await sign_up(people, first)).json()
    assert auth["email"] == UENAL
    ada = await people.sign_up("Ada")
    for number, written in enumerate((UENAL, *WRITTEN)):
        refusal(await sign_up(people, written), 409, "email_taken")
        assert (await log_in(people, written)).json()["user_id"] == auth["user_id"]
        found = await ada.get("/v1/users/search", params={"email": written[:-3]})
        assert [one["email"] for one in found.json()] == [UENAL]
        added = await ada.post(f"/v1/teams/team-{ada.team}/members", {"email": written})
        assert added.status_code == (409 if number else 201)
        admins = Admins(people.world.db, people.settings)
        assert await admins.promote(written, ["hosts"])
        assert await admins.revoke(written)
    assert len(await people.sql("select from users")) == 2


async def test_guesses_are_counted_by_account(people):
    """However the address is written; in what only the database takes for it there is no other way in."""
    await sign_up(people, "iiii@example.com")
    for number in range(1, 16):
        dotted = "".join("\u0130" if number >> place & 1 else "i" for place in range(4)) + "@example.com"
        refusal(await log_in(people, dotted), 401, "unauthorized")
        refusal(await sign_up(people, dotted), 400, "invalid_request")
    guess = partial(log_in, people, password="wrong password")
    guesses = [await guess("IIII@example.com" if number % 2 else "iiii@EXAMPLE.com") for number in range(21)]
    assert [answer.status_code for answer in guesses] == [401] * 20 + [429]
