"""Nobody learns from an answer whether another team has something: it is the answer for what nobody has."""

from __future__ import annotations

import re
from dataclasses import replace
from uuid import uuid4

import pytest

from tests.people.bodies import minimal
from tests.people.callers import IN_BODY
from tests.people.stage import build

STRANGERS = {
    "key": lambda people, stage: {"X-API-Key": stage.keys["stranger"]},
    "owner of another team": lambda people, stage: _session(people, stage, "stranger", stage.others),
    "removed member": lambda people, stage: _session(people, stage, "removed", stage.team),
    "somebody without a team": lambda people, stage: _session(people, stage, "homeless", None),
    "platform admin": lambda people, stage: _session(people, stage, "director", None),
}
ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|frozen-[0-9a-f]+")


def _session(people, stage, who, team):
    return {"Authorization": f"Bearer {people.token(stage.users[who], team)}"}


def nothing_of(stage):
    """The same stage with nothing of it: every id is nobody's."""
    return replace(
        stage,
        team=uuid4(),
        sandbox=f"sb-{uuid4()}",
        template=f"frozen-{uuid4().hex[:12]}",
        template_id=uuid4(),
        users={who: uuid4() for who in stage.users},
        own_host=uuid4(),
        key_ids={name: uuid4() for name in stage.key_ids},
    )


def said(answer):
    """What a stranger can tell one answer from another by."""
    error = answer.json().get("error", {})
    error.pop("request_id", None)
    headers = {name: value for name, value in answer.headers.items() if name not in {"x-request-id", "date"}}
    return answer.status_code, {key: ID.sub("<id>", str(value)) for key, value in error.items()}, headers


@pytest.fixture
async def stage(people):
    agent, token = await people.host()
    return await build(people, agent, token)


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_another_teams_things_are_as_good_as_none(people, route_table, stage, stranger):
    """Sandboxes and what is in them, templates, teams, members, keys: status, code and words are those for an absent
    one, and so are the headers."""
    caller, absent = STRANGERS[stranger](people, stage), nothing_of(stage)
    asked = 0
    for row in route_table:
        name = row.alias_of or row.name
        if row.access.team == "host" and stranger == "platform admin":
            continue  # who may look at all of them
        if row.access.team not in {"own", "path", "host"} or not ("{" in row.path or name in IN_BODY):
            continue
        theirs, nobodys = [
            await people.nobody.ask(row.method, one.path(row.path), headers=caller, **minimal(row, one))
            for one in (stage, absent)
        ]
        assert said(theirs) == said(nobodys), f"{row.method} {row.path}"
        assert theirs.status_code in {403, 404}
        asked += 1
    assert asked > 30


async def test_lists_hold_only_ones_own(people, route_table, stage):
    """Whatever an owner of another team can list has no id, name or address of this team in it."""
    mine = {
        *(
            str(one)
            for one in (stage.team, stage.template_id, stage.own_host, *stage.users.values(), *stage.key_ids.values())
        ),
        *(stage.emails.values()),
        stage.sandbox.removeprefix("sb-"),
        stage.template,
    }
    own = {str(stage.users["stranger"]), stage.emails["stranger"], str(stage.key_ids["stranger"])}
    caller = STRANGERS["owner of another team"](people, stage)
    renamed = await people.nobody.patch(f"/v1/teams/team-{stage.team}", {"name": "Ours"}, headers=_owner(people, stage))
    assert renamed.status_code == 204, renamed.text
    for row in route_table:
        if row.method != "GET" or "{" in row.path or not row.access.credentials or row.access.team == "any":
            continue
        answer = await people.nobody.ask("GET", row.path, headers=caller, params={"limit": 200} if row.query else {})
        assert answer.status_code == (403 if row.access.permission else 200), f"{row.path}: {answer.text}"
        assert not [one for one in mine - own if one in answer.text], row.path


def _owner(people, stage):
    return _session(people, stage, "owner", stage.team)


async def test_members_of_other_teams_are_nobodies(people, stage):
    """Within one's own team a member's id that belongs to another team is told as one of nobody."""
    path = f"/v1/teams/team-{stage.team}/members"
    owner = _owner(people, stage)
    for method, how in (("PATCH", {"json": {"role": "admin"}}), ("DELETE", {})):
        theirs, nobodys = [
            await people.nobody.ask(method, f"{path}/usr-{one}", headers=owner, **how)
            for one in (stage.users["stranger"], uuid4())
        ]
        assert said(theirs) == said(nobodys)
        assert theirs.status_code == 404


async def test_templates_and_places_in_the_trail_of_others(people, stage):
    """A sandbox from another team's template is 404 like one from none; a cursor at their audit row tells nothing."""
    caller = STRANGERS["owner of another team"](people, stage)
    theirs, nobodys = [
        await people.nobody.post("/v1/sandboxes", {"template": name}, headers=caller)
        for name in (stage.template, f"frozen-{uuid4().hex[:12]}")
    ]
    assert said(theirs) == said(nobodys)
    assert theirs.status_code == 404
    await people.nobody.patch(f"/v1/teams/team-{stage.team}", {"name": "Ours"}, headers=_owner(people, stage))
    [row] = await people.sql("select id, created_at from audit_logs where team_id = $1", stage.team)
    at = row["created_at"].strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    pages = [
        await people.nobody.get("/v1/audit-logs", headers=caller, params={"before": at, "before_id": f"log-{one}"})
        for one in (row["id"], uuid4())
    ]
    assert [page.json() for page in pages] == [{"items": []}, {"items": []}]
