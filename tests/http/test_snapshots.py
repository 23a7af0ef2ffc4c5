"""Templates over HTTP: made from sandboxes, listed, deleted."""

from __future__ import annotations

from uuid import UUID

import pytest

from capsule import errors
from capsule.model import CreateSnapshot

ONE = UUID(int=1)


async def test_a_snapshot_is_made(api):
    """201 with the template and where it is; every field and the key reach the use-case."""
    body = {"sandbox_id": f"sb-{ONE}", "name": "mine", "pause": True}
    answer = await api.client.post("/v1/snapshots", json=body, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 201
    assert answer.headers["location"] == "/v1/snapshots/mine"
    assert answer.json() == {
        "name": "mine",
        "type": "snapshot",
        "vcpus": 2,
        "memory_mb": 256,
        "size_bytes": 6,
        "platform": False,
        "created_at": "2026-01-02T03:04:05.678902Z",
    }
    (_, (_, request, key)) = api.templates.asked[-1]
    assert (request, key) == (CreateSnapshot(sandbox=ONE, name="mine", pause=True), "k")


async def test_what_is_left_out(api):
    """No name, no pause; an id without its prefix."""
    answer = await api.client.post("/v1/snapshots", json={"sandbox_id": ONE.hex})
    assert answer.json()["name"] == "made-up"
    (_, (_, request, key)) = api.templates.asked[-1]
    assert (request, key) == (CreateSnapshot(sandbox=ONE), None)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "sandbox_id"),
        ({"sandbox_id": "sb-1"}, "sandbox_id"),
        ({"sandbox_id": f"sb-{ONE}\n"}, "sandbox_id"),
        ({"sandbox_id": f"sb-{ONE}", "name": ""}, "name"),
        ({"sandbox_id": f"sb-{ONE}", "name": "-x"}, "name"),
        ({"sandbox_id": f"sb-{ONE}", "name": "x/../y"}, "name"),
        ({"sandbox_id": f"sb-{ONE}", "name": "x\n"}, "name"),
        ({"sandbox_id": f"sb-{ONE}", "name": "x" * 65}, "name"),
        ({"sandbox_id": f"sb-{ONE}", "pause": 1}, "pause"),
        ({"sandbox_id": f"sb-{ONE}", "colour": "red"}, "colour"),
    ],
)
async def test_a_bad_body_is_refused(api, refused, body, field):
    """400 naming the field; nothing is asked of the use-case."""
    assert refused(await api.client.post("/v1/snapshots", json=body), 400, "invalid_request")["field"] == field
    assert not api.templates.asked


async def test_a_body_beyond_the_limit(api, refused):
    """413, as everywhere."""
    body = {"sandbox_id": f"sb-{ONE}", "name": "x" * (1024 * 1024)}
    refused(await api.client.post("/v1/snapshots", json=body), 413, "too_large")


async def test_delete(api, refused):
    """204 without a body; unknown ones are 404, names that cannot be one 400."""
    answer = await api.client.delete("/v1/snapshots/frozen")
    assert (answer.status_code, answer.content) == (204, b"")
    refused(await api.client.delete("/v1/snapshots/nosuch"), 404, "not_found")
    for name in ("-x", "x%0a", "x" * 65, "ä"):
        assert refused(await api.client.delete(f"/v1/snapshots/{name}"), 400, "invalid_request")["field"] == "name"


async def test_one_in_use_names_its_users(api, refused):
    """409 `in_use` with the ids inside `error`."""
    api.templates.failures["delete"] = errors.InUse("One was made from it.", sandbox_ids=[f"sb-{ONE}"])
    error = refused(await api.client.delete("/v1/snapshots/frozen"), 409, "in_use")
    assert error["sandbox_ids"] == [f"sb-{ONE}"]
