"""The fixture `people` itself: who it makes can ask, and what is good or bad about their credentials is so."""

from __future__ import annotations


async def test_people_ask_for_their_team(people):
    """A person with a session and the holder of a key see the team's sandboxes."""
    team = await people.team_of_three()
    key = await people.key(team.member)
    agent, _ = await people.host()
    sandbox = await people.sandbox(team.id, agent)
    for caller in (team.owner, team.admin, team.member, key):
        answer = await caller.get("/v1/sandboxes")
        assert answer.status_code == 200, answer.text
        assert [one["id"] for one in answer.json()] == [sandbox]
    assert (await people.nobody.get("/v1/sandboxes")).status_code == 401
    assert (await people.at(None, team.owner).get("/v1/sandboxes")).json()["error"]["code"] == "no_team"


async def test_people_make_sandboxes(people):
    """The simulated fleet is behind it."""
    ada = await people.sign_up("Ada")
    await people.host()
    answer = await ada.post("/v1/sandboxes", {})
    assert answer.status_code == 201, answer.text
    assert await people.audit(ada.team) == [
        (ada.email, "team", "create", "success", {}),
        (ada.email, "sandbox", "create", "success", {"template": "minimal"}),
    ]
