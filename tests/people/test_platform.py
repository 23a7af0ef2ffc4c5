"""What platform admins do: BYOC of a team, lists of everything; and that nobody else does."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest

from capsule.db.queries import platform

LISTS = ("teams", "users", "hosts")


@pytest.fixture
async def director(people):
    """A platform admin with every permission that counts here."""
    person = await people.sign_up("Director")
    await people.make_admin(person, "byoc", "directory")
    return person


async def pages(person, what, limit=2):
    """All items, page by page; no page is longer than it may be."""
    found, cursor = [], None
    while True:
        parameters = {"limit": limit} | ({"cursor": cursor} if cursor else {})
        answer = await person.get(f"/v1/admin/{what}", params=parameters)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["items"]) <= limit
        found += answer.json()["items"]
        cursor = answer.json().get("next_cursor")
        if cursor is None:
            return found


async def test_byoc_is_turned_on_and_off(people, director):
    """Once each: what changes nothing leaves no row in the audit trail."""
    owner = await people.sign_up("Owner")
    path = f"/v1/admin/teams/team-{owner.team}/byoc"
    for enabled in (True, True, False, False):
        assert (await director.put(path, {"enabled": enabled})).status_code == 204
        team = (await owner.get(f"/v1/teams/team-{owner.team}")).json()["team"]
        assert team["is_byoc"] is enabled
    rows = await people.audit(owner.team)
    assert [row for row in rows if row[2] == "set_byoc"] == [
        (director.email, "team", "set_byoc", "info", {"enabled": "true"}),
        (director.email, "team", "set_byoc", "info", {"enabled": "false"}),
    ]
    [row] = await people.sql("select distinct scope from audit_logs where action = 'set_byoc'")
    assert row["scope"] == "admin"


async def test_byoc_of_a_team_that_is_not(people, director):
    """Unknown, deleted, or the platform's own: 404. A bad id or body: 400."""
    gone = await people.sign_up("Gone")
    await people.sql("update teams set deleted_at = now() where id = $1", gone.team)
    for team in (uuid4(), gone.team, UUID(int=0)):
        assert (await director.put(f"/v1/admin/teams/team-{team}/byoc", {"enabled": True})).status_code == 404
    path = f"/v1/admin/teams/team-{director.team}/byoc"
    for body in ({}, {"enabled": 1}, {"enabled": True, "more": 1}):
        assert (await director.put(path, body)).status_code == 400
    assert (await director.put(f"/v1/admin/teams/{director.team}/byoc", {"enabled": True})).status_code == 400


async def test_teams_are_listed_deleted_ones_too(people, director):
    """Newest first, each once over all pages, with what is in them; not the platform's own."""
    team = await people.team_of_three()
    agent, _ = await people.host()
    for status in ("running", "paused", "stopped"):
        await people.sandbox(team.id, agent, status)
    gone = await people.sign_up("Gone")
    await people.sql("update teams set deleted_at = now() where id = $1", gone.team)
    listed = await pages(director, "teams")
    assert listed == sorted(listed, key=lambda item: item["created_at"], reverse=True)
    by_id = {item["id"]: item for item in listed}
    assert len(by_id) == len(listed) == 5
    subject = by_id[team.wire_id]
    assert (subject["members"], subject["sandboxes"]) == (3, 2)
    assert [item["id"] for item in listed if "deleted_at" in item] == [f"team-{gone.team}"]
    assert set(subject) == {"id", "name", "slug", "is_byoc", "created_at", "members", "sandboxes"}


async def test_users_are_listed_with_what_they_may(people, director):
    """And nothing of their passwords. Who is no platform admin any more may nothing."""
    former = await people.sign_up("Former")
    await people.make_admin(former, "hosts")
    await people.sql("update users set is_admin = false where id = $1", former.id)
    ada = await people.sign_up("Ada")
    listed = {item["user_id"]: item for item in await pages(director, "users", limit=1)}
    assert {who: item["permissions"] for who, item in listed.items()} == {
        director.wire_id: ["byoc", "directory"],
        former.wire_id: [],
        ada.wire_id: [],
    }
    assert set(listed[ada.wire_id]) == {"user_id", "email", "name", "created_at", "permissions"}


async def test_hosts_are_listed_with_their_teams(people, director):
    """A team's own host says whose it is; deleted ones are gone."""
    own = await people.sign_up("Own")
    for _ in range(3):
        await people.host()
    await people.sql("update teams set is_byoc = true where id = $1", own.team)
    await people.sql("insert into hosts (type, team_id) values ('byoc', $1)", own.team)
    await people.sql("insert into hosts (type, deleted_at) values ('regular', now())")
    listed = await pages(director, "hosts", limit=3)
    assert [item["type"] for item in listed] == ["byoc", "regular", "regular", "regular"]
    assert (listed[0]["team_id"], listed[0]["team_name"]) == (f"team-{own.team}", "Own's Team")
    assert "team_name" not in listed[1]
    assert listed[1]["address"]


@pytest.mark.parametrize("what", LISTS)
async def test_a_cursor_or_limit_that_cannot_be(director, what):
    for parameters in ({"limit": 0}, {"limit": 201}, {"cursor": "x"}, {"page": 2}):
        assert (await director.get(f"/v1/admin/{what}", params=parameters)).status_code == 400


async def test_being_an_admin_is_not_having_a_permission(people, director):
    """is_admin alone grants nothing, nor does one permission what is another's; taken away, it is gone with the next
    request, whatever the token says."""
    nominal = await people.sign_up("Nominal")
    await people.make_admin(nominal)
    hosts_only = await people.sign_up("Hosts")
    await people.make_admin(hosts_only, "hosts")
    path = f"/v1/admin/teams/team-{director.team}/byoc"
    for person in (nominal, hosts_only, await people.sign_up("Nobody")):
        assert (await person.put(path, {"enabled": True})).status_code == 403
        for what in LISTS:
            assert (await person.get(f"/v1/admin/{what}")).status_code == 403
    assert (await director.get("/v1/admin/users")).status_code == 200
    await people.sql("delete from admin_permissions where user_id = $1 and permission = 'directory'", director.id)
    assert (await director.get("/v1/admin/users")).status_code == 403
    assert (await director.put(path, {"enabled": True})).status_code == 204


class Explaining:
    """A transaction that tells how it would answer, and answers nothing."""

    def __init__(self, tx):
        self._tx = tx
        self.plan = ""

    async def fetch(self, statement, *arguments):
        records = await self._tx.fetch(f"explain {statement}", *arguments)
        self.plan = "\n".join(record[0] for record in records)
        return []


@pytest.mark.parametrize("before", [None, (datetime(2026, 1, 1, tzinfo=UTC), UUID(int=1))])
@pytest.mark.parametrize("what", ["users", "teams"])
async def test_a_page_is_read_in_its_order(people, what, before):
    """Not sorted out of all there are."""

    async def explain(tx):
        await tx.execute("set local enable_seqscan = off")
        explaining = Explaining(tx)
        await getattr(platform, what)(explaining, 51, before)
        return explaining.plan

    plan = await people.world.db.transaction(explain)
    assert f"using {what}_page" in plan
    assert "Sort" not in plan.partition("SubPlan")[0]
