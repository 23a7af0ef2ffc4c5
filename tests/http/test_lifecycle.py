"""Pause, resume and fork over HTTP: what the use-cases are asked, and what clients get."""

from __future__ import annotations

from uuid import UUID

import pytest

from capsule import errors


@pytest.mark.parametrize("name", ["sandboxes", "capsules"])
async def test_pause_and_resume_answer_with_the_sandbox(api, refused, name):
    """Under both names, without a body; one that is not there is 404."""
    sandbox = api.sandboxes.add(host_ip="10.11.0.1")
    paused = await api.client.post(f"/v1/{name}/sb-{sandbox.id}/pause")
    assert (paused.status_code, paused.json()["id"], paused.json()["status"]) == (200, f"sb-{sandbox.id}", "paused")
    assert "host_ip" not in paused.json()
    resumed = await api.client.post(f"/v1/{name}/{sandbox.id.hex}/resume")
    assert (resumed.status_code, resumed.json()["status"]) == (200, "running")
    for verb in ("pause", "resume", "fork"):
        refused(await api.client.post(f"/v1/{name}/sb-{UUID(int=1)}/{verb}"), 404, "not_found")


async def test_a_fork_has_an_item_for_each_child(api):
    """A sandbox, or `error` with the code and message of a create; the number and the key are passed on."""
    source = api.sandboxes.add()
    answer = await api.client.post(
        f"/v1/sandboxes/sb-{source.id}/fork", json={"count": 3}, headers={"Idempotency-Key": "k"}
    )
    assert answer.status_code == 201
    *children, failed = answer.json()["items"]
    assert [child["status"] for child in children] == ["running"] * 2
    assert failed == {"error": {"code": "no_hosts_available", "message": "The host is full."}}
    (_, (principal, sandbox, count, key)) = api.sandboxes.asked[-1]
    assert (principal.team_id, sandbox, count, key) == (UUID(int=7), source.id, 3, "k")


async def test_a_fork_without_a_body_is_of_one(api):
    """An empty body is an empty object."""
    source = api.sandboxes.add()
    assert len((await api.client.post(f"/v1/sandboxes/sb-{source.id}/fork")).json()["items"]) == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [({"count": 0}, "count"), ({"count": 101}, "count"), ({"count": "3"}, "count"), ({"n": 1}, "n"), ([], None)],
)
async def test_a_bad_fork_is_refused(api, refused, body, field):
    """1 to 100, nothing else, and no other field; nothing is asked of the use-case."""
    source = api.sandboxes.add()
    error = refused(await api.client.post(f"/v1/sandboxes/sb-{source.id}/fork", json=body), 400, "invalid_request")
    assert error.get("field") == field
    assert not api.sandboxes.asked


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.SnapshotDamaged("mem.header of its snapshot is damaged."), 409),
        (errors.DiskFull("The host's disk is full."), 409),
        (errors.InvalidState("It is stopping.", status="stopping"), 409),
        (errors.NoHostsAvailable("The host lacks 256 MiB of memory.", retry_after=5), 503),
    ],
)
async def test_refusals_are_rendered_and_described(api, refused, error, status):
    """From the class, as everywhere, and each is in the document."""
    sandbox = api.sandboxes.add()
    api.sandboxes.failures["resume"] = error
    answer = await api.client.post(f"/v1/sandboxes/sb-{sandbox.id}/resume")
    assert refused(answer, status, error.code).items() >= error.extra.items()
    document = (await api.client.get("/openapi.json")).json()
    responses = document["paths"]["/v1/sandboxes/{sandbox_id}/resume"]["post"]["responses"]
    assert f"`{error.code}`" in responses[str(status)]["description"]
