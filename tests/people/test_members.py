"""Members over HTTP: joining, roles, leaving, being removed, and all that goes with it."""

from __future__ import annotations

import re
from uuid import uuid4

import pytest

from capsule.db.errors import ConstraintViolated


async def add(person, team, email, **how):
    return await person.post(f"/v1/teams/{team.wire_id}/members", {"email": email}, **how)


async def roles(person, team):
    answer = await person.get(f"/v1/teams/{team.wire_id}/members")
    return {member["user_id"]: member["role"] for member in answer.json()}


def code(answer):
    return answer.json()["error"]["code"]


async def admin_rows(people, team):
    """The trail of the team's members: who, action, whose, status, metadata."""
    rows = await people.sql(
        """select actor_name, action, resource_id, scope, status, metadata::text from audit_logs
           where team_id = $1 and resource_type = 'member' order by created_at, id""",
        team.id,
    )
    return [tuple(row) for row in rows]


async def test_joining(people):
    """By address in whatever case and form, as `member`, at once and last in the list; audited with the address."""
    team, eve = await people.team_of_three(), await people.sign_up("Eve", email="Eve.L@Example.com")
    answer = await add(team.admin, team, "eve.l@EXAMPLE.com")
    assert answer.status_code == 201, answer.text
    member = answer.json()
    assert set(member) == {"user_id", "name", "email", "role", "joined_at"}
    assert (member["user_id"], member["name"], member["role"]) == (eve.wire_id, "Eve", "member")
    listed = (await eve.get(f"/v1/teams/{team.wire_id}/members")).json()
    assert listed[-1] == member
    assert [one["role"] for one in listed] == ["owner", "admin", "member", "member"]
    [row] = await admin_rows(people, team)
    assert row[:5] == (team.admin.email, "add", eve.wire_id, "admin", "success")
    assert row[5] in {
        f'{{"role": "member", "email": "{eve.email}"}}',
        f'{{"email": "{eve.email}", "role": "member"}}',
    }


async def test_who_cannot_join(people):
    """Somebody unknown, somebody who is in it, nobody at all, one more than the limit; and a member adds nobody."""
    team, eve = await people.team_of_three(), await people.sign_up("Eve")
    assert code(await add(team.admin, team, "nobody@example.com")) == "not_found"
    assert code(await add(team.admin, team, team.member.email)) == "conflict"
    assert code(await add(team.admin, team, team.owner.email.upper())) == "conflict"
    assert code(await add(team.admin, team, "no address")) == "invalid_request"
    assert code(await add(team.member, team, eve.email)) == "forbidden"
    await people.sql("update teams set max_members = 3 where id = $1", team.id)
    refused = await add(team.owner, team, eve.email)
    assert (code(refused), refused.json()["error"]["limit"]) == ("quota_exceeded", "max_members")
    assert await admin_rows(people, team) == []
    assert len(await roles(team.owner, team)) == 3


async def test_the_same_member_twice(people):
    """An Idempotency-Key gives the first answer again; for somebody else it is refused; who was removed meanwhile stays
    removed, and who may add nobody any more is told so."""
    team, eve = await people.team_of_three(), await people.sign_up("Eve")
    key = {"Idempotency-Key": "k"}
    first = await add(team.admin, team, eve.email, headers=key)
    again = await add(team.admin, team, eve.email, headers=key)
    assert (again.status_code, again.json()) == (201, first.json())
    assert len(await admin_rows(people, team)) == 1
    bob = await people.sign_up("Bob")
    assert code(await add(team.admin, team, bob.email, headers=key)) == "idempotency_key_reused"
    assert (await team.owner.delete(f"/v1/teams/{team.wire_id}/members/{eve.wire_id}")).status_code == 204
    assert code(await add(team.admin, team, eve.email, headers=key)) == "conflict"
    await people.sql(
        "update memberships set role = 'member' where user_id = $1 and team_id = $2", team.admin.id, team.id
    )
    assert code(await add(team.admin, team, eve.email, headers=key)) == "forbidden"


async def test_pages_of_members(people):
    """In the order they joined, to the microsecond, and by id where two joined at once."""
    team = await people.team_of_three()
    for number in range(4):
        person = await people.sign_up(f"P{number}")
        assert (await add(team.owner, team, person.email)).status_code == 201
    await people.sql("update memberships set joined_at = now() where team_id = $1 and role = 'member'", team.id)
    whole = (await team.member.get(f"/v1/teams/{team.wire_id}/members")).json()
    assert len(whole) == 7
    seen, path = [], f"/v1/teams/{team.wire_id}/members?limit=2"
    while path:
        answer = await team.member.get(path)
        seen += answer.json()
        link = re.fullmatch(r'<(.+)>; rel="next"', answer.headers.get("link", ""))
        path = link and link[1]
    assert seen == whole


async def test_roles(people):
    """Admins and owners give them; the same one again is no change; the owner's is not to be had or taken."""
    team = await people.team_of_three()
    path = f"/v1/teams/{team.wire_id}/members"
    assert code(await team.member.patch(f"{path}/{team.member.wire_id}", {"role": "admin"})) == "forbidden"
    assert (await team.admin.patch(f"{path}/{team.member.wire_id}", {"role": "member"})).status_code == 204
    assert await admin_rows(people, team) == []
    assert (await team.admin.patch(f"{path}/{team.member.wire_id}", {"role": "admin"})).status_code == 204
    assert (await roles(team.owner, team))[team.member.wire_id] == "admin"
    for role in ("admin", "member"):
        assert code(await team.admin.patch(f"{path}/{team.owner.wire_id}", {"role": role})) == "forbidden"
        assert code(await team.owner.patch(f"{path}/{team.owner.wire_id}", {"role": role})) == "forbidden"
    for role in ("owner", "boss", "", None):
        assert code(await team.owner.patch(f"{path}/{team.member.wire_id}", {"role": role})) == "invalid_request"
    assert code(await team.owner.patch(f"{path}/usr-{uuid4()}", {"role": "admin"})) == "not_found"
    assert code(await team.owner.patch(f"{path}/{team.id}", {"role": "admin"})) == "invalid_request"
    assert (await team.admin.patch(f"{path}/{team.admin.wire_id}", {"role": "member"})).status_code == 204
    assert code(await team.admin.patch(f"{path}/{team.member.wire_id}", {"role": "member"})) == "forbidden"
    rows = await admin_rows(people, team)
    assert rows == [
        (team.admin.email, "role_update", team.member.wire_id, "admin", "info", '{"new_role": "admin"}'),
        (team.admin.email, "role_update", team.admin.wire_id, "admin", "info", '{"new_role": "member"}'),
    ]


async def keys_of(people, team):
    """Names of the team's keys that are alive."""
    rows = await people.sql("select name from api_keys where team_id = $1 and revoked_at is null", team.id)
    return {row["name"] for row in rows}


@pytest.mark.parametrize("how", ["removed", "left"])
async def test_who_goes_loses_everything_at_once(people, how):
    """Trap 19: the session that was good a moment ago is of no team; their keys of this team are dead and in the trail,
    those of others' and of their other teams are not."""
    team = await people.team_of_three()
    mine = [await people.key(team.member, name) for name in ("a", "b")]
    await people.key(team.admin, "c")
    elsewhere = await people.key(people.at((await people.sign_up("Zoe")).team, team.member), "d")
    assert (await mine[0].get("/v1/sandboxes")).status_code == 200
    if how == "removed":
        gone = await team.admin.delete(f"/v1/teams/{team.wire_id}/members/{team.member.wire_id}")
    else:
        gone = await team.member.post(f"/v1/teams/{team.wire_id}/leave")
    assert gone.status_code == 204
    assert code(await team.member.get("/v1/sandboxes")) == "no_team"
    assert code(await team.member.get(f"/v1/teams/{team.wire_id}")) == "not_found"
    assert [code(await key.get("/v1/sandboxes")) for key in mine] == ["unauthorized"] * 2
    assert (await elsewhere.get("/v1/sandboxes")).status_code == 200
    assert await keys_of(people, team) == {"c"}
    actor = team.admin if how == "removed" else team.member
    done = ("remove", "warning") if how == "removed" else ("leave", "info")
    first, *rest = [row for row in await people.audit(team.id) if row[2] in {"remove", "leave", "revoke"}]
    assert first == (actor.email, "member", *done, {})
    assert sorted(rest, key=str) == [
        (actor.email, "api_key", "revoke", "warning", {"name": name, "reason": f"member {how}"}) for name in ("a", "b")
    ]
    [row] = await people.sql("select distinct scope from audit_logs where action = 'revoke'")
    assert row["scope"] == "team"
    again = await team.admin.delete(f"/v1/teams/{team.wire_id}/members/{team.member.wire_id}")
    assert code(again) == "not_found"


async def test_who_comes_back_has_no_old_keys(people):
    """Joining again gives the membership, not what went with the last one."""
    team = await people.team_of_three()
    key = await people.key(team.member)
    assert (await team.member.post(f"/v1/teams/{team.wire_id}/leave")).status_code == 204
    assert (await add(team.owner, team, team.member.email)).status_code == 201
    assert (await team.member.get("/v1/sandboxes")).status_code == 200
    assert code(await key.get("/v1/sandboxes")) == "unauthorized"


async def test_the_owner_stays(people):
    """Neither removed nor gone, by nobody; and the database would not have it either."""
    team = await people.team_of_three()
    for person in (team.owner, team.admin):
        answer = await person.delete(f"/v1/teams/{team.wire_id}/members/{team.owner.wire_id}")
        assert code(answer) == "forbidden"
    assert code(await team.owner.post(f"/v1/teams/{team.wire_id}/leave")) == "forbidden"
    assert code(await team.member.delete(f"/v1/teams/{team.wire_id}/members/{team.admin.wire_id}")) == "forbidden"
    assert len(await roles(team.owner, team)) == 3
    for statement in (
        "delete from memberships where team_id = $1 and role = 'owner'",
        "update memberships set role = 'admin' where team_id = $1 and role = 'owner'",
        "update memberships set role = 'owner' where team_id = $1 and role = 'member'",
    ):
        with pytest.raises(ConstraintViolated):
            await people.sql(statement, team.id)


async def test_an_admin_removes_themselves(people):
    """Removing oneself is being removed: the row says so."""
    team = await people.team_of_three()
    path = f"/v1/teams/{team.wire_id}/members/{team.admin.wire_id}"
    assert (await team.admin.delete(path)).status_code == 204
    assert code(await team.admin.delete(path)) == "not_found"
    assert [row[1] for row in await admin_rows(people, team)] == ["remove"]
