"""Every way of failing has one shape, a request id, and no detail that is not the client's."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/v2/sandboxes",
        "/v1/sandboxes/",
        "//v1/sandboxes",
        "/health/",
        "/v1/%ff%00",
        "/é",
        "/docs/assets/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_an_unknown_path_is_404(api, refused, method, path):
    """JSON in our shape, and no redirect to a better spelling."""
    refused(await api.client.request(method, path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/sandboxes", "GET, HEAD, POST"),
        ("OPTIONS", "/v1/capsules", "GET, HEAD, POST"),
        ("POST", "/health", "GET, HEAD"),
        ("GET", "/v1/hosts/auth/refresh", "POST"),
        ("FROBNICATE", "/v1/sandboxes/x/exec", "POST"),
        ("TRACE", "/v1/sandboxes/x", "DELETE, GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_405_with_allow(api, refused, method, path, allowed):
    """Allow lists what there is."""
    answer = await api.client.request(method, path)
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


async def test_head_is_get_without_the_body(api):
    """Also for a refusal."""
    answer = await api.client.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")
    answer = await api.client.head("/nope")
    assert (answer.status_code, answer.content) == (404, b"")
    assert answer.headers["x-request-id"]
    assert (await api.client.get("/health")).status_code == 200


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), ExceptionGroup("secret", [KeyError("secret")])])
async def test_a_bug_is_500_and_says_nothing(api, refused, events, error):
    """Constant text for the client, the whole story under the request's id for us."""
    api.sandboxes.failures["create"] = error
    answer = await api.client.post("/v1/sandboxes")
    found = refused(answer, 500, "internal")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    (logged,) = [event for event in events if event["event"] == "request_failed"]
    assert logged["exc_info"]
    assert logged["request_id"] == found["request_id"]
    assert logged["operation"] == "createSandbox"


async def test_the_clients_request_id_is_kept_when_it_is_harmless(api):
    """So that it can be found in both logs; what could harm a log or a header is replaced."""
    for given, kept in (
        (b"abc-123", True),
        (b"x" * 128, True),
        (b"x" * 129, False),
        (b"a b", False),
        (b"<script>", False),
        (b"\xff", False),
        (b"", False),
    ):
        answer = await api.client.get("/nope", headers={"X-Request-Id": given})
        got = answer.headers["x-request-id"]
        assert (got.encode("latin-1") == given) == kept
        assert answer.json()["error"]["request_id"] == got
        assert got


async def test_each_request_is_logged_once_by_template(api, events, until):
    """Method, template, status, duration, id; never the path, which holds ids, nor the query."""
    await api.client.get("/v1/sandboxes?limit=3", headers={"X-Request-Id": "mine"})
    await until(lambda: "http_request" in [event["event"] for event in events])
    (logged,) = [event for event in events if event["event"] == "http_request"]
    assert logged["duration_ms"] >= 0
    wanted = {"method": "GET", "route": "/v1/sandboxes", "status": 200, "request_id": "mine", "log_level": "info"}
    assert logged.items() >= wanted.items()
    assert "limit" not in repr(logged)


MALFORMED = {
    "no HTTP": (b"hello\r\n\r\n", 400),
    "bad version": (b"GET / HTTP/9\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "bad header": (b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400),
    "NUL in a header": (b"GET / HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n", 400),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "bad length": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    "smuggling": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "head without end": (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 70_000, 431),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
    "authority": (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
    "another scheme": (b"GET ftp://x/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
    "bad authority": (b"GET http://[ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "no path": (b"GET ?x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "upgrade to HTTP/2": (
        (
            b"GET /nope HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
        ),
        404,
    ),
    "WebSocket": (
        (
            b"GET /v1/sandboxes HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        ),
        404,
    ),
    "bad WebSocket": (
        b"GET /v1/sandboxes HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        400,
    ),
    "bad chunk": (
        (
            b"POST /v1/hosts/register HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: application/json\r\n\r\nzz\r\n"
        ),
        400,
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_requests_are_answered_in_the_same_shape(api, name):
    """What never reaches a handler: the server's own refusals, and those of the router."""
    sent, status = MALFORMED[name]
    stream_answer = await api.raw(sent)
    head, _, body = stream_answer.partition(b"\r\n\r\n")
    error = json.JSONDecoder().raw_decode(body.decode())[0]["error"]
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert f"x-request-id: {error['request_id']}".encode() in head.lower()
    assert b"content-type: application/json" in head.lower()
    assert error["code"]
    assert error["message"]
    assert (await api.client.get("/health")).status_code == 200


async def test_an_absolute_target_is_its_path(api):
    """RFC 9112 asks servers to take it."""
    answer = await api.raw(b"GET http://x/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_no_answer_names_the_server_or_may_be_cached(api):
    """No Server header; nosniff and no-store on answers of the API."""
    answer = await api.client.get("/v1/sandboxes")
    assert "server" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
