"""Making hosts known and looking at them: regular ones and a team's own, who sees which, and the token that joins."""

from __future__ import annotations

import shlex
from uuid import UUID, uuid4

import pytest

from tests.fleet.joining import registration
from tests.people.together import at_once, refusal

PATH = "/v1/hosts"


async def make(person, **body):
    answer = await person.post(PATH, {"type": "regular", **body})
    assert answer.status_code == 201, answer.text
    return answer.json()


async def test_a_host_joins_with_the_token_it_was_made_with(people, keeper):
    """The answer has all that an operator types; the token works once."""
    made = await make(keeper, provider="metal", availability_zone="a")
    host, token = made["host"], made["registration_token"]
    assert shlex.split(made["join_command"]) == [
        "capsule-agent",
        "join",
        "--url",
        people.settings.url,
        "--token",
        token,
    ]
    assert (host["type"], host["status"], host["cordoned"], host["tags"]) == ("regular", "pending", False, [])
    assert (host["provider"], host["availability_zone"]) == ("metal", "a")
    assert not {"address", "team_id", "team_name"} & set(host)
    assert (await people.nobody.post(f"{PATH}/register", registration(token))).json()["host"]["id"] == host["id"]
    refusal(await people.nobody.post(f"{PATH}/register", registration(token)), 401, "unauthorized")
    assert (await keeper.get(f"{PATH}/{host['id']}")).json()["address"] == "192.0.2.7:7001"
    [row] = await people.sql("select * from audit_logs where resource_type = 'host' and action = 'create'")
    assert (row["actor_name"], row["scope"], row["status"], row["resource_id"], row["team_id"]) == (
        keeper.email,
        "admin",
        "success",
        host["id"],
        None,
    )
    kept = [*await people.sql("select * from host_registration_tokens"), *await people.sql("select * from audit_logs")]
    assert token.removeprefix("htok-") not in repr(kept)


async def test_a_fresh_token_voids_the_one_before(people, keeper):
    """However often it is asked for; the trail says that it was. It also joins a host that has joined before."""
    made = await make(keeper)
    path = f"{PATH}/{made['host']['id']}/token"
    second, third = [(await keeper.post(path)).json() for _ in range(2)]
    for void in (made, second):
        refusal(
            await people.nobody.post(f"{PATH}/register", registration(void["registration_token"])), 401, "unauthorized"
        )
    assert (await people.nobody.post(f"{PATH}/register", registration(third["registration_token"]))).status_code == 201
    last = (await keeper.post(path)).json()
    assert last["join_command"].endswith(last["registration_token"])
    assert (await people.nobody.post(f"{PATH}/register", registration(last["registration_token"]))).status_code == 201
    rows = await people.sql("select action, scope, status from audit_logs where action = 'token_create'")
    assert [tuple(row) for row in rows] == [("token_create", "admin", "info")] * 3


async def test_who_makes_which(people, keeper, byoc):
    """Regular hosts: the permission, whatever the role. A team's own: its admins, if it may bring some, and nobody for
    them."""
    stranger, own = await people.sign_up("Stranger"), {"type": "byoc", "team_id": byoc.wire_id}
    for person in (byoc.owner, stranger):
        refusal(await person.post(PATH, {"type": "regular"}), 403, "forbidden")
    made = await make(byoc.admin, **own)
    assert (made["host"]["team_id"], made["host"]["team_name"]) == (byoc.wire_id, "Lovelace owner's Team")
    assert (await make(byoc.owner, type="byoc"))["host"]["team_id"] == byoc.wire_id
    refusal(await byoc.member.post(PATH, own), 403, "forbidden")
    for person in (stranger, keeper):
        refusal(await person.post(PATH, own), 404, "not_found")
    refusal(await stranger.post(PATH, {"type": "byoc"}), 403, "forbidden")  # her team brings none
    refusal(await people.at(None, stranger).post(PATH, {"type": "byoc"}), 403, "no_team")
    refusal(await stranger.post(PATH, {"type": "byoc", "team_id": f"team-{UUID(int=0)}"}), 404, "not_found")
    assert (
        refusal(await keeper.post(PATH, {"type": "regular", "team_id": byoc.wire_id}), 400, "invalid_request")["field"]
        == "team_id"
    )
    for body in ({}, {"type": "x"}, {"type": "regular", "provider": ""}, {"type": "regular", "more": 1}):
        refusal(await keeper.post(PATH, body), 400, "invalid_request")
    [row] = await people.sql("select count(*) from hosts")
    assert row["count"] == 2


async def test_a_team_has_so_many_hosts(people, byoc, monkeypatch):
    """Of those made at once, too, since the team's row is locked."""
    monkeypatch.setattr("capsule.fleet.joining.MAX_HOSTS", 3)
    answers = await at_once([lambda: byoc.admin.post(PATH, {"type": "byoc"})] * 6)
    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [403] * 3
    assert {answer.json()["error"].get("limit") for answer in answers if answer.status_code == 403} == {"max_hosts"}


async def test_sent_again_with_its_key(people, keeper):
    """One host, with a fresh token each time, of which the last is good; another request with the key is refused, and
    so is the same one once the host has joined or is gone."""
    headers = {"Idempotency-Key": "k"}

    def send(**body):
        return keeper.post(PATH, {"type": "regular", **body}, headers=headers)

    answers = await at_once([send] * 4)
    assert [answer.status_code for answer in answers] == [201] * 4
    assert len({answer.json()["host"]["id"] for answer in answers}) == 1
    assert len({answer.json()["registration_token"] for answer in answers}) == 4
    refusal(await send(provider="metal"), 409, "idempotency_key_reused")
    last = (await send()).json()
    assert (await people.nobody.post(f"{PATH}/register", registration(last["registration_token"]))).status_code == 201
    refusal(await send(), 409, "conflict")
    assert (await keeper.delete(f"{PATH}/{last['host']['id']}")).status_code == 204
    refusal(await send(), 409, "conflict")
    [row] = await people.sql("select count(*) from audit_logs where resource_type = 'host' and action = 'create'")
    assert row["count"] == 1


async def test_a_key_stands_for_a_host_of_one_team(people, byoc):
    """Sent again from a session of another team it asks for another host: who was removed from the first team gets no
    token of its host, neither without a role there nor by having one elsewhere."""
    headers, other = {"Idempotency-Key": "k"}, await people.team_of_three("Hopper")
    await people.sql("update teams set is_byoc = true where id = $1", other.id)
    await people.join(other.id, byoc.admin, "admin")
    elsewhere, body = people.at(other.id, byoc.admin), {"type": "byoc"}
    made = (await byoc.admin.post(PATH, body, headers=headers)).json()
    named = await byoc.admin.post(PATH, {**body, "team_id": byoc.wire_id}, headers=headers)
    assert named.json()["host"]["id"] == made["host"]["id"]
    gone = await byoc.owner.delete(f"/v1/teams/{byoc.wire_id}/members/{byoc.admin.wire_id}")
    assert gone.status_code == 204
    refusal(await elsewhere.post(PATH, body, headers=headers), 409, "idempotency_key_reused")
    refusal(await elsewhere.post(PATH, {**body, "team_id": byoc.wire_id}, headers=headers), 404, "not_found")
    answer = await people.nobody.post(f"{PATH}/register", registration(named.json()["registration_token"]))
    assert answer.status_code == 201


async def test_who_sees_which(people, keeper, byoc):
    """Platform admins all, with whose they are; others their session's team's, in any role; none learns of the rest."""
    regular = (await make(keeper))["host"]["id"]
    own = (await make(byoc.owner, type="byoc"))["host"]["id"]
    director, stranger = await people.sign_up("Director"), await people.sign_up("Stranger")
    await people.make_admin(director, "directory")
    for person in (keeper, director):
        page = (await person.get(PATH)).json()
        assert [(one["id"], one.get("team_name")) for one in page["items"]] == [
            (own, "Lovelace owner's Team"),
            (regular, None),
        ]
        assert [(await person.get(f"{PATH}/{one}")).status_code for one in (own, regular)] == [200, 200]
    for person in (byoc.owner, byoc.member):
        assert [one["id"] for one in (await person.get(PATH)).json()["items"]] == [own]
        assert (await person.get(f"{PATH}/{own}")).json()["id"] == own
        refusal(await person.get(f"{PATH}/{regular}"), 404, "not_found")
    assert (await stranger.get(PATH)).json() == {"items": []}
    for host in (own, regular, f"host-{uuid4()}"):
        refusal(await stranger.get(f"{PATH}/{host}"), 404, "not_found")
    refusal(await people.at(None, stranger).get(PATH), 403, "no_team")


async def test_pages(people, keeper):
    """Newest first, each once; a cursor or limit that cannot be is refused."""
    made = [(await make(keeper))["host"]["id"] for _ in range(5)]
    found, cursor = [], None
    while True:
        page = (await keeper.get(PATH, params={"limit": 2} | ({"cursor": cursor} if cursor else {}))).json()
        found += [one["id"] for one in page["items"]]
        if (cursor := page.get("next_cursor")) is None:
            break
    assert found == made[::-1]
    for parameters in ({"limit": 0}, {"limit": 201}, {"cursor": "x"}, {"page": 1}):
        refusal(await keeper.get(PATH, params=parameters), 400, "invalid_request")


CHANGES = (
    ("DELETE", "", None),
    ("GET", "/delete-preview", None),
    ("POST", "/token", None),
    ("GET", "/tags", None),
    ("POST", "/tags", {"tag": "gpu"}),
    ("DELETE", "/tags/zone", None),
    ("POST", "/cordon", None),
    ("POST", "/uncordon", None),
    ("POST", "/drain", None),
)


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_regular_hosts_are_their_keepers(people, keeper, byoc, method, path, body):
    """Who may only look is told so, everybody else of no host; a bad id is that."""
    agent, _ = await people.host()
    await people.sql("insert into host_tags values ($1, 'zone')", agent.host)
    director = await people.sign_up("Director")
    await people.make_admin(director, "directory", "byoc", "templates")
    url = f"{PATH}/host-{agent.host}{path}"
    refusal(await director.ask(method, url, json=body), 403, "forbidden")
    refusal(await byoc.owner.ask(method, url, json=body), 404, "not_found")
    refusal(await keeper.ask(method, f"{PATH}/{agent.host}{path}", json=body), 400, "invalid_request")
    refusal(await keeper.ask(method, f"{PATH}/host-{uuid4()}{path}", json=body), 404, "not_found")
    assert (await keeper.ask(method, url, json=body)).status_code < 300


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_a_teams_own_are_its_admins_until_it_is_gone(people, keeper, byoc, method, path, body):
    """The platform's people look and no more. Of a deleted team they clear up."""
    agent, _ = await people.host()
    await people.sql("update hosts set type = 'byoc', team_id = $1 where id = $2", byoc.id, agent.host)
    await people.sql("insert into host_tags values ($1, 'zone')", agent.host)
    url = f"{PATH}/host-{agent.host}{path}"
    for person in (keeper, byoc.member):
        refusal(await person.ask(method, url, json=body), 403, "forbidden")
    assert (await byoc.owner.delete(f"/v1/teams/{byoc.wire_id}")).status_code == 204
    refusal(await byoc.admin.ask(method, url, json=body), 404, "not_found")
    assert (await keeper.ask(method, url, json=body)).status_code < 300
