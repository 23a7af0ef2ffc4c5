"""Tags, cordon and uncordon, and what they do to where sandboxes come to lie."""

from __future__ import annotations

import pytest

from tests.people.together import at_once, refusal


@pytest.fixture
async def host(people):
    """A regular host; its agent and its path."""
    agent, _ = await people.host()
    return agent, f"/v1/hosts/host-{agent.host}"


async def actions(people):
    rows = await people.sql(
        """select action, scope, status, metadata::text from audit_logs where resource_type = 'host'
           order by created_at"""
    )
    return [tuple(row) for row in rows]


async def test_tags(people, keeper, host):
    """Added once, listed in order, taken away once; the trail has each change and no more."""
    _, path = host
    for tag, expected in (("zone=b", ["zone=b"]), ("gpu", ["gpu", "zone=b"]), ("gpu", ["gpu", "zone=b"])):
        answer = await keeper.post(f"{path}/tags", {"tag": tag})
        assert (answer.status_code, answer.json()) == (201, {"items": expected})
    assert (await keeper.get(f"{path}/tags")).json() == {"items": ["gpu", "zone=b"]}
    assert (await keeper.get(path)).json()["tags"] == ["gpu", "zone=b"]
    assert (await keeper.delete(f"{path}/tags/zone=b")).status_code == 204
    refusal(await keeper.delete(f"{path}/tags/zone=b"), 404, "not_found")
    assert (await keeper.get(f"{path}/tags")).json() == {"items": ["gpu"]}
    assert await actions(people) == [
        ("tag_add", "admin", "info", '{"tag": "zone=b"}'),
        ("tag_add", "admin", "info", '{"tag": "gpu"}'),
        ("tag_remove", "admin", "info", '{"tag": "zone=b"}'),
    ]


@pytest.mark.parametrize("tag", ["", "-a", "a b", "a,b", "ä", "a\n", "a" * 65, "a/b", None, 1])
async def test_what_is_no_tag(keeper, host, tag):
    """The form that the database holds too; a comma would be two."""
    refusal(await keeper.post(f"{host[1]}/tags", {"tag": tag}), 400, "invalid_request")
    if tag in {"-a", "a,b", "a" * 65}:
        refusal(await keeper.delete(f"{host[1]}/tags/{tag}"), 400, "invalid_request")


async def test_so_many_tags(people, keeper, host, monkeypatch):
    """At once, too: the host's row is locked."""
    monkeypatch.setattr("capsule.fleet.service.MAX_TAGS", 3)
    answers = await at_once([lambda n=n: keeper.post(f"{host[1]}/tags", {"tag": f"t{n}"}) for n in range(6)])
    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [403] * 3
    assert len((await keeper.get(f"{host[1]}/tags")).json()["items"]) == 3


async def test_a_cordoned_host_takes_no_new_ones(people, keeper, host):
    """Those that rest there can be resumed; uncordoned it takes new ones. Each is told once."""
    agent, path = host
    key = await people.key(keeper)
    resting = await people.sandbox(keeper.team, agent, "paused")
    for _ in range(2):
        assert (await keeper.post(f"{path}/cordon")).status_code == 204
    assert (await keeper.get(path)).json()["cordoned"] is True
    refusal(await key.post("/v1/sandboxes", {}), 503, "no_hosts_available")
    assert (await key.post(f"/v1/sandboxes/{resting}/resume")).status_code == 200
    for _ in range(2):
        assert (await keeper.post(f"{path}/uncordon")).status_code == 204
    assert (await key.post("/v1/sandboxes", {})).status_code == 201
    assert await actions(people) == [(one, "admin", "info", "{}") for one in ("cordon", "uncordon")]


async def test_drained_and_opened_again(people, keeper, host):
    """Draining is shown, nothing starts or wakes there; uncordoned the host is online, told once each."""
    agent, path = host
    key = await people.key(keeper)
    resting = await people.sandbox(keeper.team, agent, "paused")
    for _ in range(2):
        answer = await keeper.post(f"{path}/drain")
        assert (answer.status_code, answer.json()["status"], answer.json()["cordoned"]) == (202, "draining", True)
    assert (await keeper.post(f"{path}/cordon")).status_code == 204
    refusal(await key.post("/v1/sandboxes", {}), 503, "no_hosts_available")
    refusal(await key.post(f"/v1/sandboxes/{resting}/resume"), 503, "host_unavailable")
    assert (await keeper.post(f"{path}/uncordon")).status_code == 204
    shown = (await keeper.get(path)).json()
    assert (shown["status"], shown["cordoned"]) == ("online", False)
    assert (await key.post(f"/v1/sandboxes/{resting}/resume")).status_code == 200
    assert [row[0] for row in await actions(people)] == ["drain", "uncordon"]


async def test_a_host_that_is_not_proven_comes_back_unreachable(people, keeper, host):
    """Opened again before it was reached where it says it is: not online for that."""
    agent, path = host
    assert (await keeper.post(f"{path}/drain")).status_code == 202
    await people.sql("update hosts set credential_epoch = credential_epoch + 1 where id = $1", agent.host)
    assert (await keeper.post(f"{path}/uncordon")).status_code == 204
    assert (await keeper.get(path)).json()["status"] == "unreachable"


async def test_nothing_to_drain(keeper):
    """A host that never joined; it can be closed."""
    made = (await keeper.post("/v1/hosts", {"type": "regular"})).json()["host"]["id"]
    refusal(await keeper.post(f"/v1/hosts/{made}/drain"), 409, "conflict")
    assert (await keeper.post(f"/v1/hosts/{made}/cordon")).status_code == 204
