"""Teams over HTTP: made, listed, looked at, renamed, by whom, and what the trail says of it."""

from __future__ import annotations

import re
from uuid import UUID, uuid4

import pytest

from tests.fixtures.people import quick_settings


@pytest.fixture
def people_settings():
    return quick_settings(max_teams_per_user=4)


async def make(person, name="Analytical", **how):
    answer = await person.post("/v1/teams", {"name": name}, **how)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def names(person):
    return [team["name"] for team in (await person.get("/v1/teams")).json()]


async def trail(people, team):
    return await people.audit(UUID(team.removeprefix("team-")))


async def test_a_team_and_its_owner(people):
    """Its maker owns it; slug, times and role as the contract has them; audited for admins."""
    ada = await people.sign_up("Ada")
    answer = await ada.post("/v1/teams", {"name": "O'Brien_@ 2-b"})
    team = answer.json()
    assert set(team) == {"id", "name", "slug", "is_byoc", "created_at", "role"}
    assert answer.headers["location"] == f"/v1/teams/{team['id']}"
    assert re.fullmatch(r"[0-9a-f]{6}-[0-9a-f]{6}", team["slug"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", team["created_at"])
    assert (team["role"], team["is_byoc"]) == ("owner", False)
    assert await trail(people, team["id"]) == [(ada.email, "team", "create", "success", {})]
    rows = await people.sql("select scope, resource_id from audit_logs where resource_id = $1", team["id"])
    assert [tuple(row) for row in rows] == [("admin", team["id"])]
    shown = (await ada.get(f"/v1/teams/{team['id']}")).json()
    [member] = shown.pop("members")
    assert shown == {"team": team}
    assert (member["user_id"], member["email"], member["name"], member["role"]) == (
        ada.wire_id,
        ada.email,
        ada.name,
        "owner",
    )


@pytest.mark.parametrize("name", ["", "a" * 129, "a\n", "Ä", "<b>", "a.b", None, 7])
async def test_names_that_a_team_cannot_have(people, name):
    """Refused by the form, naming the field, for making and for renaming."""
    ada = await people.sign_up("Ada")
    for answer in (
        await ada.post("/v1/teams", {"name": name}),
        await ada.patch(f"/v1/teams/team-{ada.team}", {"name": name}),
    ):
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, "name")


async def test_pages_of_teams(people):
    """Newest first, in pages that a Link leads through; another's teams are not in it, nor deleted ones."""
    ada, bob = await people.sign_up("Ada"), await people.sign_up("Bob")
    for name in ("one", "two", "three"):
        await make(ada, name)
    await make(bob, "his")
    await people.sql("update teams set deleted_at = now() where name = 'two'")
    assert await names(ada) == ["three", "one", "Ada's Team"]
    seen, path = [], "/v1/teams?limit=1"
    while path:
        answer = await ada.get(path)
        seen += [team["name"] for team in answer.json()]
        link = re.fullmatch(r'<(.+)>; rel="next"', answer.headers.get("link", ""))
        path = link and link[1]
    assert seen == ["three", "one", "Ada's Team"]
    assert (await ada.get("/v1/teams?cursor=x")).status_code == 400


async def test_no_more_than_so_many_teams(people):
    """Only owned ones that live count; the limit is named."""
    team = await people.team_of_three()
    member = team.member
    for number in range(3):
        await make(member, f"t{number}")
    refused = (await member.post("/v1/teams", {"name": "fifth"})).json()["error"]
    assert (refused["code"], refused["limit"]) == ("quota_exceeded", "max_teams_per_user")
    gone = (await member.get("/v1/teams")).json()[0]["id"]
    assert (await member.delete(f"/v1/teams/{gone}")).status_code == 204
    await make(member, "fifth")


async def test_the_same_team_twice(people):
    """An Idempotency-Key gives the team that was made first, also at the limit; with another name it is refused, and
    what is gone is not made again."""
    ada = await people.sign_up("Ada")
    first = await make(ada, "one", headers={"Idempotency-Key": "k"})
    for name in ("two", "three"):
        await make(ada, name)
    assert await make(ada, "one", headers={"Idempotency-Key": "k"}) == first
    other = await ada.post("/v1/teams", {"name": "1"}, headers={"Idempotency-Key": "k"})
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert (await ada.delete(f"/v1/teams/{first['id']}")).status_code == 204
    again = await ada.post("/v1/teams", {"name": "one"}, headers={"Idempotency-Key": "k"})
    assert again.json()["error"]["code"] == "conflict"
    bob = await people.sign_up("Bob")
    assert (await make(bob, "one", headers={"Idempotency-Key": "k"}))["id"] != first["id"]


async def test_renaming(people):
    """Admins and owners; old and new name are in the team's trail, and the slug stays. The same name is no change."""
    team = await people.team_of_three()
    path = f"/v1/teams/{team.wire_id}"
    before = (await team.owner.get(path)).json()["team"]
    assert (await team.member.patch(path, {"name": "x"})).json()["error"]["code"] == "forbidden"
    rows = len(await people.audit(team.id))
    assert (await team.admin.patch(path, {"name": before["name"]})).status_code == 204
    assert len(await people.audit(team.id)) == rows
    assert (await team.admin.patch(path, {"name": "Engine"})).status_code == 204
    assert (await team.owner.get(path)).json()["team"] == {**before, "name": "Engine"}
    [row] = (await people.audit(team.id))[rows:]
    assert row == (
        team.admin.email,
        "team",
        "rename",
        "info",
        {"old_name": before["name"], "new_name": "Engine"},
    )
    [row] = await people.sql("select scope from audit_logs where action = 'rename'")
    assert row["scope"] == "team"


async def test_who_is_no_member_sees_nothing(people):
    """404 for everything of another's team, word for word as for one that never was; a bad id is 400."""
    team, eve = await people.team_of_three(), await people.sign_up("Eve")
    for name in (team.wire_id, f"team-{uuid4()}", f"team-{UUID(int=0)}"):
        path = f"/v1/teams/{name}"
        answers = [
            await eve.get(path),
            await eve.patch(path, {"name": "mine"}),
            await eve.delete(path),
            await eve.get(f"{path}/members"),
            await eve.post(f"{path}/members", {"email": eve.email}),
            await eve.patch(f"{path}/members/{team.member.wire_id}", {"role": "admin"}),
            await eve.delete(f"{path}/members/{team.member.wire_id}"),
            await eve.post(f"{path}/leave"),
        ]
        said = {(one.status_code, one.json()["error"]["code"], one.json()["error"]["message"]) for one in answers}
        assert len(said) == 1
        assert {(status, code) for status, code, _ in said} == {(404, "not_found")}
    for bad in (str(team.id), f"team-{team.id}x", f"usr-{team.id}", "team-"):
        assert (await eve.get(f"/v1/teams/{bad}")).status_code == 400
