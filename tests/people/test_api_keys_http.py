"""/v1/api-keys over HTTP: what it answers, and to whom."""

from __future__ import annotations

from uuid import uuid4

import pytest
import trio

PATH = "/v1/api-keys"


@pytest.fixture
async def team(people):
    return await people.team_of_three()


async def test_a_key_from_its_making_to_its_end(people, team):
    """Made (201, shown once), used, listed with its maker and its use, revoked (204), dead, gone (404)."""
    answer = await team.member.post(PATH, {"name": "<b>ci</b>"})
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert set(made) == {"id", "name", "prefix", "key", "created_at", "created_by"}
    maker = {"user_id": team.member.wire_id, "email": team.member.email, "name": team.member.name}
    assert (made["name"], made["prefix"], made["created_by"]) == ("<b>ci</b>", made["key"][:12], maker)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    shown = {name: value for name, value in made.items() if name != "key"}
    assert (await team.member.get(PATH)).json() == [shown]

    using = {"X-API-Key": made["key"]}
    assert (await people.nobody.get("/v1/sandboxes", headers=using)).status_code == 200
    (used,) = (await team.owner.get(PATH)).json()
    assert used.pop("last_used") >= made["created_at"]
    assert used == shown
    assert made["key"] not in (await team.owner.get(PATH)).text

    assert (await team.member.delete(f"{PATH}/{made['id']}")).status_code == 204
    assert (await people.nobody.get("/v1/sandboxes", headers=using)).status_code == 401
    assert (await team.member.delete(f"{PATH}/{made['id']}")).status_code == 404
    assert (await team.owner.get(PATH)).json() == []


async def test_a_key_revoked_while_in_use_is_dead_with_the_next_request(people, team):
    """Eight clients use it all the time: after the answer to the revocation, no request is let in any more."""
    made = (await team.admin.post(PATH, {"name": "busy"})).json()
    revoked = False
    late = []

    async def client():
        while True:
            began_after = revoked
            answer = await people.nobody.get("/v1/sandboxes", headers={"X-API-Key": made["key"]})
            if began_after:
                late.append(answer.status_code)
                return
            assert answer.status_code in {200, 401}

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(client)
            await team.admin.get(PATH)
            assert (await team.admin.delete(f"{PATH}/{made['id']}")).status_code == 204
            revoked = True
    assert late == [401] * 8


async def test_whose_key_it_is_says_what_one_may(people, team):
    """A team-mate's: 403 for a member, 204 for an admin. Another team's, or none: 404 for all. Not an id: 400."""
    owners = (await team.owner.post(PATH, {"name": "of the owner"})).json()
    members = (await team.member.post(PATH, {"name": "of the member"})).json()
    stranger = await people.sign_up("Mallory")
    foreign = (await stranger.post(PATH, {"name": "foreign"})).json()
    assert [key["id"] for key in (await team.member.get(PATH)).json()] == [members["id"]]
    assert [key["id"] for key in (await team.admin.get(PATH)).json()] == [members["id"], owners["id"]]
    assert (await team.member.delete(f"{PATH}/{owners['id']}")).status_code == 403
    for who in (team.member, team.owner):
        for key in (foreign["id"], f"key-{uuid4()}"):
            assert (await who.delete(f"{PATH}/{key}")).status_code == 404
        for key in ("nonsense", foreign["id"].removeprefix("key-"), foreign["id"].upper()):
            assert (await who.delete(f"{PATH}/{key}")).status_code == 400
    assert (await team.admin.delete(f"{PATH}/{owners['id']}")).status_code == 204
    assert (await stranger.get(PATH)).json()[0]["id"] == foreign["id"]


async def test_keys_do_not_manage_keys(people, team):
    """A good key is 403, a bad one 401, nothing 401."""
    key = await people.key(team.owner)
    wrong = {"X-API-Key": "cap_" + "0" * 40}
    for method, path in (("POST", PATH), ("GET", PATH), ("DELETE", f"{PATH}/key-{key.id}")):
        assert (await key.ask(method, path)).status_code == 403
        assert (await team.owner.ask(method, path, headers=wrong)).status_code == 401
        assert (await people.nobody.ask(method, path)).status_code == 401


@pytest.mark.parametrize(
    "body", [{}, {"name": ""}, {"name": "x" * 129}, {"name": "a\0b"}, {"name": 1}, {"name": "a", "team_id": "x"}, []]
)
async def test_bad_bodies_are_refused(team, body):
    answer = await team.owner.post(PATH, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


async def test_the_same_request_gets_the_same_answer(people, team):
    """With an Idempotency-Key; with the same for another request, or of another person, 409."""
    headers = {"Idempotency-Key": "one-key-please"}
    first = await team.member.post(PATH, {"name": "ci"}, headers=headers)
    again = await team.member.post(PATH, {"name": "ci"}, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    for who, name in ((team.member, "other"), (team.owner, "ci")):
        refused = await who.post(PATH, {"name": name}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert len((await team.owner.get(PATH)).json()) == 1
    rows = [row for row in await people.audit(team.id) if row[1] == "api_key"]
    assert rows == [(team.member.email, "api_key", "create", "success", {"name": "ci"})]


async def test_pages_are_linked(team):
    """A bare array; the Link header leads through all of it."""
    made = [(await team.member.post(PATH, {"name": f"k{number}"})).json()["id"] for number in range(5)]
    seen, path = [], f"{PATH}?limit=2"
    while path:
        answer = await team.member.get(path)
        seen += [key["id"] for key in answer.json()]
        path = answer.links["next"]["url"] if "next" in answer.links else None
    assert seen == made[::-1]


async def test_the_limit_is_named(people, team):
    await people.sql("update teams set max_api_keys = 1 where id = $1", team.id)
    assert (await team.member.post(PATH, {"name": "a"})).status_code == 201
    refused = await team.owner.post(PATH, {"name": "b"})
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "quota_exceeded"
    assert refused.json()["error"]["limit"] == "max_api_keys"
