"""Sandboxes over HTTP: what the use-cases are asked, and what clients get."""

from __future__ import annotations

from uuid import UUID

import pytest

from capsule import errors
from capsule.model import CreateSandbox


async def test_create_without_a_body_uses_every_default(api):
    """An empty body is an empty object; the answer is the contract's Sandbox, absent fields left out."""
    answer = await api.client.post("/v1/sandboxes")
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/sandboxes/{answer.json()['id']}"
    (_, (principal, request, key)) = api.sandboxes.asked[-1]
    assert principal.team_id == UUID(int=7)
    assert key is None
    assert request == CreateSandbox(template="minimal", vcpus=None, memory_mb=None, timeout_sec=0, metadata={}, envs={})
    assert answer.json() == {
        "id": answer.json()["id"],
        "status": "running",
        "template": "minimal",
        "vcpus": 1,
        "memory_mb": 512,
        "disk_mb": 1024,
        "timeout_sec": 0,
        "host_id": f"host-{UUID(int=5)}",
        "host_ip": "10.11.0.1",
        "created_at": "2026-01-02T03:04:05.678901Z",
        "started_at": "2026-01-02T03:04:05.678901Z",
        "last_updated": "2026-01-02T03:04:05.678901Z",
    }


async def test_create_passes_everything_on(api):
    """Every field and the idempotency key reach the use-case; metadata comes back."""
    body = {
        "template": "minimal",
        "vcpus": 64,
        "memory_mb": 1_048_576,
        "timeout_sec": 31_536_000,
        "metadata": {"k" * 64: "v" * 1024},
        "envs": {"_A1": ""},
    }
    answer = await api.client.post("/v1/sandboxes", json=body, headers={"Idempotency-Key": "k" * 255})
    assert answer.status_code == 201
    assert answer.json()["metadata"] == body["metadata"]
    (_, (_, request, key)) = api.sandboxes.asked[-1]
    assert key == "k" * 255
    assert request == CreateSandbox(**body)


@pytest.mark.parametrize("key", ["", "k" * 256, "a b", "ä"])
async def test_a_bad_idempotency_key_is_refused(api, refused, key):
    """1 to 255 visible ASCII characters, nothing else."""
    answer = await api.client.post("/v1/sandboxes", headers={"Idempotency-Key": key.encode()})
    assert refused(answer, 400, "invalid_request")["field"] == "Idempotency-Key"
    assert not api.sandboxes.asked


async def test_one_sandbox_under_both_names(api):
    """Both mounts reach the same sandbox, with and without the prefix of its id."""
    sandbox = api.sandboxes.add()
    for name in ("sandboxes", "capsules"):
        for text in (f"sb-{sandbox.id}", sandbox.id.hex):
            answer = await api.client.get(f"/v1/{name}/{text}")
            assert answer.json()["id"] == f"sb-{sandbox.id}"


async def test_why_a_sandbox_is_in_its_status_is_told(api):
    """`reason` comes with the sandboxes that have one."""
    failed = api.sandboxes.add(status="error", reason="its VM ended")
    assert (await api.client.get(f"/v1/sandboxes/sb-{failed.id}")).json()["reason"] == "its VM ended"
    running = api.sandboxes.add()
    assert "reason" not in (await api.client.get(f"/v1/sandboxes/sb-{running.id}")).json()


@pytest.mark.parametrize(
    "text", ["x", "sb-", "SB-{}", "sb-{}0", "usr-{}", "{}", " sb-{}", "sb-{}%0a", "upper", "sb_{}", "0" * 31]
)
async def test_a_malformed_id_is_400_everywhere(api, refused, text):
    """Strict parsing on every sandbox route; nothing is asked of the use-cases."""
    sandbox = api.sandboxes.add()
    name = str(sandbox.id).upper() if text == "upper" else text.format(sandbox.id)
    client, base = api.client, f"/v1/sandboxes/{name}"
    answers = [
        await client.get(base),
        await client.delete(base),
        await client.post(f"{base}/ping"),
        await client.post(f"{base}/pause"),
        await client.post(f"{base}/resume"),
        await client.post(f"{base}/fork"),
        await client.post(f"{base}/exec", json={"cmd": "x"}),
        await client.get(f"{base}/processes"),
        await client.delete(f"{base}/processes/1"),
        await client.post(f"{base}/files/write", files={"path": (None, "/a"), "file": b"x"}),
        *[
            await client.post(f"{base}/files/{verb}", json={"path": "/a"})
            for verb in ("read", "list", "mkdir", "remove")
        ],
    ]
    for answer in answers:
        assert refused(answer, 400, "invalid_request")["field"] == "sandbox_id"
    assert not api.sandboxes.asked


async def test_delete_and_ping_answer_204(api, refused):
    """Nothing in the body, no Content-Type; a sandbox that is not there is 404."""
    sandbox = api.sandboxes.add()
    for answer in (
        await api.client.delete(f"/v1/sandboxes/sb-{sandbox.id}"),
        await api.client.delete(f"/v1/sandboxes/sb-{sandbox.id}"),
        await api.client.post(f"/v1/sandboxes/sb-{sandbox.id}/ping"),
    ):
        assert answer.status_code == 204
        assert not answer.content
        assert "content-type" not in answer.headers
    refused(await api.client.delete(f"/v1/sandboxes/sb-{UUID(int=1)}"), 404, "not_found")


@pytest.mark.parametrize("name", ["sandboxes", "capsules"])
async def test_pages_follow_their_link_and_drop_nothing(api, name):
    """Rows one microsecond apart are all seen once, newest first; the last page has no link."""
    made = [api.sandboxes.add() for _ in range(7)]
    seen, path = [], f"/v1/{name}?limit=3&status=running"
    while path:
        answer = await api.client.get(path)
        assert isinstance(answer.json(), list)
        seen += [row["id"] for row in answer.json()]
        path = answer.links["next"]["url"] if "next" in answer.links else None
        assert path is None or path.startswith(f"/v1/{name}?status=running&limit=3&cursor=")
    assert seen == [f"sb-{view.id}" for view in reversed(made)]


async def test_list_filters_by_status(api):
    """Repeated and comma-separated values are one set; none is None (the use-case's default)."""
    await api.client.get("/v1/sandboxes")
    await api.client.get("/v1/sandboxes?status=stopped,error&status=paused&limit=200")
    (_, (_, none, fifty, before)), (_, (_, three, many, _)) = api.sandboxes.asked
    assert (none, fifty, before) == (None, 50, None)
    assert (three, many) == ({"stopped", "error", "paused"}, 200)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.QuotaExceeded("At most 5 vcpus.", limit="vcpus"), 403),
        (errors.NoTeam("This key has no team."), 403),
        (errors.IdempotencyKeyReused("Used for another request."), 409),
        (errors.InvalidState("It is paused; resume it.", status="paused"), 409),
        (errors.NoHostsAvailable("No host has room.", retry_after=7), 503),
        (errors.Busy("Try again.", retry_after=0.2), 503),
        (errors.HostUnavailable("Its host is away."), 503),
        (errors.DatabaseUnavailable("Try again."), 503),
    ],
)
async def test_a_use_cases_refusal_is_rendered_from_its_class(api, refused, error, status):
    """Code, status, extra fields and Retry-After come from the typed error."""
    api.sandboxes.failures["create"] = error
    answer = await api.client.post("/v1/sandboxes")
    assert refused(answer, status, error.code).items() >= error.extra.items()
    expected = None if error.retry_after is None else str(max(1, round(error.retry_after)))
    assert answer.headers.get("retry-after") == expected
