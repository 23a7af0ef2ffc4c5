"""Several people act on a team at once: each decision is made on what is so when it is written, and the trail tells
exactly what happened, in the order in which it did."""

from __future__ import annotations

import random

import msgspec
import pytest
import trio

from tests.fixtures.people import quick_settings

ROUNDS = 4
ACTIONS = 30
EXPECTED = {201, 204, 401, 403, 404, 409}
RANK = {"member": 0, "admin": 1, "owner": 2}


@pytest.fixture
def people_settings():
    return quick_settings(rate_limits="add_member=1000/3600,create_team=1000/3600", max_teams_per_user=10)


@pytest.mark.parametrize("taken", ["demoted", "removed", "left", "deleted"])
async def test_rights_that_are_just_taken_away(people, team_lock, taken):
    """A request that was let in waits for the team while its sender loses the right to it: it is refused."""
    team, eve = await people.team_of_three(), await people.sign_up("Eve")
    path = f"/v1/teams/{team.wire_id}"
    answers = {}

    async def take():
        ask = {
            "demoted": lambda: team.owner.patch(f"{path}/members/{team.admin.wire_id}", {"role": "member"}),
            "removed": lambda: team.owner.delete(f"{path}/members/{team.admin.wire_id}"),
            "left": lambda: team.admin.post(f"{path}/leave"),
            "deleted": lambda: team.owner.delete(path),
        }
        assert (await ask[taken]()).status_code == 204

    def late(name, ask):
        async def run():
            answers[name] = (await ask()).status_code

        return run

    async with team_lock(people.world, team.id) as lock:
        await lock.queue(take)
        await lock.queue(late("rename", lambda: team.admin.patch(path, {"name": "Mine"})))
        await lock.queue(late("add", lambda: team.admin.post(f"{path}/members", {"email": eve.email})))
        await lock.queue(
            late("role", lambda: team.admin.patch(f"{path}/members/{team.member.wire_id}", {"role": "admin"}))
        )
        await lock.queue(late("remove", lambda: team.admin.delete(f"{path}/members/{team.member.wire_id}")))
    refused = 403 if taken == "demoted" else 404
    assert answers == dict.fromkeys(("rename", "add", "role", "remove"), refused)
    rows = await people.sql(
        "select action from audit_logs where team_id = $1 and actor_id = $2", team.id, team.admin.id
    )
    assert [row["action"] for row in rows] == (["leave"] if taken == "left" else [])


async def test_a_key_beside_the_removal(people, team_lock):
    """Its maker is being removed: there is no key, or it is dead; in either order."""
    for first in ("key", "removal"):
        team = await people.team_of_three(first)
        answers = []

        async def key(team=team, answers=answers):
            answers.append(await team.member.post("/v1/api-keys", {"name": "late"}))

        async def removal(team=team):
            path = f"/v1/teams/{team.wire_id}/members/{team.member.wire_id}"
            assert (await team.admin.delete(path)).status_code == 204

        async with team_lock(people.world, team.id) as lock:
            for one in (key, removal) if first == "key" else (removal, key):
                await lock.queue(one)
        [answer] = answers
        assert answer.status_code == (201 if first == "key" else 403)
        rows = await people.sql("select revoked_at from api_keys where team_id = $1", team.id)
        assert [row["revoked_at"] is None for row in rows] == [False] * (first == "key")


async def test_one_place_left(people):
    """Of many who are added at once to a team with one place, one is in; of many teams made at once, as many as a user
    may own."""
    team = await people.team_of_three()
    await people.sql("update teams set max_members = 4 where id = $1", team.id)
    others = [await people.sign_up(f"P{number}") for number in range(8)]
    statuses = []

    async def add(person):
        answer = await team.admin.post(f"/v1/teams/{team.wire_id}/members", {"email": person.email})
        statuses.append(answer.status_code)

    async with trio.open_nursery() as nursery:
        for person in others:
            nursery.start_soon(add, person)
    assert sorted(statuses) == [201] + [403] * 7
    made = []

    async def make(number):
        made.append((await team.owner.post("/v1/teams", {"name": f"t{number}"})).status_code)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(make, number)
    assert sorted(made) == [201] * 9 + [403] * 11


async def test_deleted_twice_at_once(people, team_lock):
    """The second finds no team; there is one row of each kind in the trail."""
    team, (agent, _) = await people.team_of_three(), await people.host()
    sandbox = await people.sandbox(team.id, agent)
    statuses = []

    async def delete():
        statuses.append((await team.owner.delete(f"/v1/teams/{team.wire_id}")).status_code)

    async with team_lock(people.world, team.id) as lock:
        await lock.queue(delete)
        await lock.queue(delete)
    assert statuses == [204, 404]
    rows = await people.sql(
        "select resource_id from audit_logs where team_id = $1 and action in ('delete', 'destroy') order by created_at",
        team.id,
    )
    assert [row["resource_id"] for row in rows] == [team.wire_id, sandbox]


async def test_one_person_added_many_times(people):
    """At once: one is told 201, the others 409; with one Idempotency-Key all are told the same."""
    team = await people.team_of_three()
    for headers, expected in (({}, [201] + [409] * 9), ({"Idempotency-Key": "k"}, [201] * 10)):
        person, answers = await people.sign_up("Eve"), []

        async def add(person=person, headers=headers, answers=answers):
            path = f"/v1/teams/{team.wire_id}/members"
            answers.append(await team.owner.post(path, {"email": person.email}, headers=headers))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(add)
        assert sorted(answer.status_code for answer in answers) == expected
        assert len({answer.text for answer in answers if answer.status_code == 201}) == 1
    rows = await people.sql("select from audit_logs where resource_type = 'member' and action = 'add'")
    assert len(rows) == 2


class Round:
    """A team of many, and everything that its members do to each other."""

    def __init__(self, people, rng, crowd):
        self.people = people
        self.rng = rng
        self.crowd = crowd
        self.answers = []

    async def begin(self, number):
        owner, *rest = self.crowd
        made = await owner.post("/v1/teams", {"name": f"Round {number}"})
        self.path = f"/v1/teams/{made.json()['id']}"
        self.id = self.people.person({**_auth(owner), "team_id": made.json()["id"], "token": ""}).team
        self.crowd = [self.people.at(self.id, person) for person in self.crowd]
        for index, person in enumerate(rest[:-2]):
            await self.people.join(self.id, person, "admin" if index < 3 else "member")
        rows = await self.people.sql("select user_id, role from memberships where team_id = $1", self.id)
        self.members = {f"usr-{row['user_id']}": row["role"] for row in rows}
        self.keys = [await self.people.key(person) for person in self.crowd[:-2]]

    def action(self):
        """One of them, by somebody, to somebody: (what it is, how it is asked)."""
        rng, path = self.rng, self.path
        who, whom, key = rng.choice(self.crowd), rng.choice(self.crowd), rng.choice(self.keys)
        member = f"{path}/members/{whom.wire_id}"
        choices = [
            ("role_update", 6, lambda: who.patch(member, {"role": rng.choice(["admin", "member"])})),
            ("remove", 4, lambda: who.delete(member)),
            ("leave", 3, lambda: who.post(f"{path}/leave")),
            ("add", 5, lambda: who.post(f"{path}/members", {"email": whom.email})),
            ("rename", 2, lambda: who.patch(path, {"name": f"Name {rng.randrange(3)}"})),
            ("create key", 4, lambda: who.post("/v1/api-keys", {"name": "new"})),
            ("revoke key", 4, lambda: who.delete(f"/v1/api-keys/key-{key.id}")),
        ]
        [(name, _, ask)] = rng.choices(choices, [weight for _, weight, _ in choices])
        return name, ask

    async def run(self, *, delete):
        todo = [self.action() for _ in range(ACTIONS)]
        if delete:
            todo.insert(self.rng.randrange(ACTIONS), ("delete", lambda: self.crowd[0].delete(self.path)))

        async def act(name, ask, delay):
            await trio.sleep(delay)
            answer = await ask()
            assert answer.status_code in EXPECTED, answer.text
            self.answers.append((name, answer.status_code))

        async with trio.open_nursery() as nursery:
            for name, ask in todo:
                nursery.start_soon(act, name, ask, self.rng.random() * 0.05)

    def done(self, name):
        """How often it was answered with success."""
        return sum(1 for one, status in self.answers if one == name and status < 300)


def _auth(person):
    return {"user_id": person.wire_id, "email": person.email, "name": person.name}


def replay(members, rows):
    """What the trail says became of `members`; every step must have been possible, and its actor have had the right."""
    members, counts, deleted = dict(members), {}, False
    for row in rows:
        who, whom, action = f"usr-{row['actor_id']}", row["resource_id"], row["action"]
        if row["resource_type"] == "api_key":
            assert who in members or action == "revoke", "a stranger made a key"
            continue
        assert not deleted, f"{action} after the end"
        counts[action] = counts.get(action, 0) + 1
        metadata = msgspec.json.decode(row["metadata"])
        needed = {"leave": 0, "delete": 2}.get(action, 1)
        if action != "create":
            assert RANK[members[who]] >= needed, f"{action} by a {members[who]}"
        match action:
            case "add":
                assert whom not in members
                members[whom] = metadata["role"]
            case "remove" | "leave":
                assert members.pop(whom) != "owner"
            case "role_update":
                assert members[whom] not in {"owner", metadata["new_role"]}
                members[whom] = metadata["new_role"]
            case "delete":
                deleted = True
    return members, counts


INVARIANTS = {
    "live teams without exactly one owner": """
        select t.id from teams t left join memberships m on m.team_id = t.id and m.role = 'owner'
        where t.deleted_at is null and t.slug <> '000000-000000' group by t.id having count(m.user_id) <> 1""",
    "users with more than one default": """
        select user_id from memberships where is_default group by user_id having count(*) > 1""",
    "living keys of who is no member": """
        select k.id from api_keys k where k.revoked_at is null and not exists (
          select from memberships m where m.team_id = k.team_id and m.user_id = k.created_by)""",
    "keys revoked more or less than once in the trail": """
        select k.id from api_keys k left join audit_logs a on a.resource_id = 'key-' || k.id and a.action = 'revoke'
        group by k.id having count(a.id) <> case when k.revoked_at is null then 0 else 1 end""",
}


@pytest.mark.parametrize("seed", range(ROUNDS))
async def test_everything_at_once(people, seed):
    """Random role changes, removals, departures, additions, keys made and revoked, renames, and in half of the rounds
    the end of the team: no invariant is broken, and the trail, played from the beginning, gives what there is."""
    rng = random.Random(seed)
    crowd = [await people.sign_up(f"P{number}") for number in range(9)]
    game = Round(people, rng, crowd)
    await game.begin(seed)
    await game.run(delete=seed % 2 == 1)
    for name, query in INVARIANTS.items():
        assert await people.sql(query) == [], name
    rows = await people.sql(
        """select actor_id, resource_type, resource_id, action, metadata::text from audit_logs
           where team_id = $1 order by created_at, id""",
        game.id,
    )
    members, counts = replay(game.members, rows)
    found = await people.sql("select user_id, role from memberships where team_id = $1", game.id)
    assert members == {f"usr-{row['user_id']}": row["role"] for row in found}
    for action in ("add", "remove", "leave", "delete"):
        assert counts.get(action, 0) == game.done(action), action
    for action in ("role_update", "rename"):
        assert counts.get(action, 0) <= game.done(action), action
    assert people.world.db.statistics().retries == 0, "two of them waited for each other"
