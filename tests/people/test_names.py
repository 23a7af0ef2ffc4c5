"""What people and their API keys may be called: the same through every door, and as it is documented."""

from __future__ import annotations

import re
import unicodedata

import msgspec
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from capsule import errors
from capsule.http.account_bodies import SignUpBody, UpdateMeBody
from capsule.http.api_keys import CreateApiKeyBody
from capsule.people.admins import Admins
from capsule.people.names import MAX_NAME, is_name

GOOD = (
    "Ada",
    "D'Arcy <b>",
    "名前",
    "أسماء",
    "Zoë e\u0301",
    "x" * MAX_NAME,
    "👩\u200d💻",  # one picture of two
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # as Persian is written
    "ci 2026",
)
BAD = (
    "",
    " ",
    "x" * (MAX_NAME + 1),
    "a\nb",
    "Ada\n",
    "\x1b[31m",
    "a\x00",
    "a\x7f",
    "a\x85b",
    "\x9b31m",
    "a\u2028b",
    *(f"a{chr(point)}b" for point in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))),
    "\u200b",
    " \u00a0\u3000",
    "\u2800\u3164",
    "\ufeff\u00ad\u200d",
    "\U000e0041\U000e007f",
)


@pytest.mark.parametrize("name", GOOD)
def test_names_of_people(name):
    """Of any writing, in one line."""
    assert is_name(name)


@pytest.mark.parametrize("name", BAD)
def test_no_names(name):
    """What another terminal or page would show as something else, or not at all."""
    assert not is_name(name)


@given(st.text(max_size=6))
@example("\u2060")
def test_what_is_seen_and_nothing_else_is_a_name(name):
    """By the categories of Unicode."""
    kinds = {unicodedata.category(one) for one in name}
    if is_name(name):
        assert not kinds & {"Cc", "Zl", "Zp"}
        assert name.strip()
    elif name:
        assert kinds & {"Cc", "Cf", "Zl", "Zp", "Zs"} or not kinds - {"Lo", "So", "Mn", "Cn"}


async def test_every_door_has_the_same_rule(people):
    """Signing up, a new name, a key; each answers 400 for `name` or does it."""
    ada = await people.sign_up("Ada")
    for number, name in enumerate([*GOOD, *BAD]):
        new = {"email": f"new{number}@example.com", "password": ada.password, "name": name}
        for answer in (
            await people.nobody.post("/v1/auth/signup", new),
            await ada.patch("/v1/me", {"name": name}),
            await ada.post("/v1/api-keys", {"name": name}),
        ):
            if name in GOOD:
                assert answer.status_code in {200, 201}
                assert answer.json()["name"] == name
            else:
                assert answer.status_code == 400
                assert answer.json()["error"]["field"] == "name"


async def test_the_operators_door_too(people):
    """`capsule admin create`."""
    admins = Admins(people.world.db, people.settings)
    for number, name in enumerate([*GOOD, *BAD]):
        new = {
            "email": f"root{number}@example.com",
            "name": name,
            "password": "correct horse",
            "permissions": ["hosts"],
        }
        if name in GOOD:
            await admins.create(**new)
        else:
            with pytest.raises(errors.InvalidRequest, match="printable"):
                await admins.create(**new)
    assert {row["name"] for row in await people.sql("select name from users")} == set(GOOD)


async def test_the_document_says_what_is_accepted(people):
    """Its pattern and lengths decide as the server does."""
    schemas = yaml.safe_load((await people.nobody.get("/openapi.yaml")).text)["components"]["schemas"]
    for body in (SignUpBody, UpdateMeBody, CreateApiKeyBody):
        schema = schemas[body.__name__]["properties"]["name"]
        for name in (*GOOD, *BAD):
            documented = (
                schema["minLength"] <= len(name) <= schema["maxLength"]
                and re.search(schema["pattern"], name) is not None
            )
            assert documented == (name in GOOD), (body, name)
            rest = {"email": "a@example.com", "password": "correct horse"} if body is SignUpBody else {}
            try:
                msgspec.convert({**rest, "name": name}, body)
            except msgspec.ValidationError:
                assert name in BAD
            else:
                assert name in GOOD
