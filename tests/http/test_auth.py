"""Who may ask: API keys on sandbox routes, and no falling through."""

from __future__ import annotations

import httpx
import pytest

from capsule import errors

HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": ""},
        {"X-API-Key": "cap_"},
        {"X-API-Key": HEX},
        {"X-API-Key": f"cap_{HEX[:-1]}"},
        {"X-API-Key": f"cap_{HEX}0"},
        {"X-API-Key": f"cap_{HEX.upper()}"},
        {"X-API-Key": f"xyz_{HEX}"},
        {"X-API-Key": b"cap_\xff" + HEX.encode()},
        {"X-API-Key": "cap_" + "f" * 40},
        {"X-API-Key": "bad", "Authorization": "Bearer good"},
        {"Authorization": "Bearer abc"},
        {"Authorization": f"cap_{HEX}"},
        [("X-API-Key", f"cap_{HEX}"), ("X-API-Key", f"cap_{HEX}")],
    ],
)
async def test_without_a_good_key_everything_is_401(api, refused, headers):
    """Missing, malformed, unknown, twice, or of another kind; on every route, before anything else is looked at."""
    async with httpx.AsyncClient(base_url=str(api.client.base_url), trust_env=False) as client:
        for method, path in (
            ("POST", "/v1/sandboxes"),
            ("GET", "/v1/capsules?limit=bad"),
            ("GET", "/v1/sandboxes/malformed"),
            ("POST", "/v1/sandboxes/malformed/exec"),
            ("POST", "/v1/sandboxes/malformed/files/write"),
            ("GET", "/v1/snapshots"),
        ):
            answer = await client.request(method, path, headers=headers)
            refused(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"].startswith("Bearer ")
    assert not api.sandboxes.asked


async def test_the_same_digits_behind_e2b(api):
    """They are the same key; the authenticator sees one spelling."""
    answer = await api.client.get("/v1/sandboxes", headers={"X-API-Key": f"e2b_{HEX}"})
    assert answer.status_code == 200
    assert api.authenticator.asked[-1] == ("api_key", (f"cap_{HEX}",))


async def test_a_key_without_a_team_is_403(api, refused):
    """The authenticator's refusal reaches the client."""
    api.authenticator.failures["api_key"] = errors.NoTeam("This key's team was deleted.")
    refused(await api.client.get("/v1/sandboxes"), 403, "no_team")


async def test_a_stranger_uploads_nothing(api, refused):
    """401 comes before the body is read."""
    answer = await api.client.post(
        "/v1/sandboxes/x/files/write",
        files={"path": (None, "/a"), "file": b"x" * 1_000_000},
        headers={"X-API-Key": "bad"},
    )
    refused(answer, 401, "unauthorized")
    assert not list(api.spool_dir.iterdir())
