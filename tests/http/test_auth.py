"""Who may ask: API keys on sandbox routes, and no falling through."""

from __future__ import annotations

import httpx
import pytest
import trio
import trio.testing

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
    async with httpx.AsyncClient(base_url=str(api.client.base_url), timeout=30, trust_env=False) as client:
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


@pytest.mark.parametrize(
    ("lines", "pieces", "times"),
    [
        (["Content-Length: 11"], [b'{"cmd":"x"}'], 1),
        (["Content-Length: 11"], [b'{"cmd"', b':"x"}'], 2),
        (["Transfer-Encoding: chunked"], [b"b\r\n", b'{"cmd":"x"}\r\n0\r\n\r\n'], 2),
    ],
)
async def test_who_asks_is_found_out_again_after_a_late_body_only(api, until, lines, pieces, times):
    """What let them in may be dead by then. Nobody else pays for a second look."""
    path = f"/v1/sandboxes/sb-{api.sandboxes.add().id}/exec"
    gate = api.authenticator.gates["api_key"] = trio.Event()
    asked = api.authenticator.asked
    with trio.fail_after(30):
        async with await trio.open_tcp_stream("127.0.0.1", api.port) as stream:
            head = api.head("POST", path, "Content-Type: application/json", *lines)
            await stream.send_all(head + pieces[0])
            await until(lambda: len(asked) == 1)
            await trio.testing.wait_all_tasks_blocked(0.05)  # the server has taken what was sent
            gate.set()
            if pieces[1:]:
                await trio.testing.wait_all_tasks_blocked(0.05)  # it waits for the rest
                await stream.send_all(pieces[1])
            answer = b"".join([chunk async for chunk in stream])
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert [method for method, _ in asked] == ["api_key"] * times


async def test_an_upload_by_a_key_that_is_dead_by_then(api, until):
    """Nothing is written, nothing is left of it."""
    path = f"/v1/sandboxes/sb-{api.sandboxes.add().id}/files/write"
    form = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    body = form % (b"path", b"/a") + form % (b"file", b"content") + b"--x--\r\n"
    lines = ["Content-Type: multipart/form-data; boundary=x", f"Content-Length: {len(body)}"]
    with trio.fail_after(30):
        async with await trio.open_tcp_stream("127.0.0.1", api.port) as stream:
            await stream.send_all(api.head("POST", path, *lines) + body[:-1])
            await until(lambda: [method for method, _ in api.sandboxes.asked] == ["get"])
            api.authenticator.failures["api_key"] = errors.Unauthorized("The key was revoked.")
            await stream.send_all(body[-1:])
            answer = b"".join([chunk async for chunk in stream])
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert [method for method, _ in api.sandboxes.asked] == ["get"]
    assert not list(api.spool_dir.iterdir())
