"""Before the upgrade: what is wrong by then is an ordinary answer."""

from __future__ import annotations

import json

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

UPGRADE = (
    "Connection: keep-alive, Upgrade",
    "Upgrade: WebSocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)


def head(sockets, route="exec/stream", *lines, upgrade=UPGRADE, key=True, path=None):
    credential = [f"X-API-Key: {sockets.key}"] if key else []
    sent = [f"GET {path or sockets.path(route)} HTTP/1.1", "Host: x", *upgrade, *credential, *lines, "", ""]
    return "\r\n".join(sent).encode()


async def answer(sockets, *lines, **how):
    """Status, headers, error of a refusal."""
    raw = await sockets.raw(head(sockets, *lines, **how))
    top, _, body = raw.partition(b"\r\n\r\n")
    status, *rest = top.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in rest)
    error = json.loads(body)["error"]
    assert error["request_id"] == headers["x-request-id"]
    assert headers["connection"] == "close"
    return int(status.split()[1]), headers, error


async def test_what_is_refused_before_the_upgrade(sockets):
    """In our words, with our codes."""
    bad = "X-API-Key: cap_" + "0" * 40
    paused = sockets.sandboxes.add(status="paused").id
    refusals = {
        (401, "unauthorized"): await answer(sockets, "exec/stream", bad, key=False),
        (403, "forbidden"): await answer(sockets, "exec/stream", "Origin: https://evil.example"),
        (404, "not_found"): await answer(sockets, path="/v1/sandboxes"),
        (409, "invalid_state"): await answer(sockets, path=f"/v1/sandboxes/sb-{paused}/pty"),
        (400, "invalid_request"): await answer(sockets, "exec/stream", "Content-Length: 5"),
    }
    for (status, code), (got, headers, error) in refusals.items():
        assert (got, error["code"]) == (status, code)
        assert ("www-authenticate" in headers) is (status == 401)
    nobodys = await answer(sockets, path="/v1/sandboxes/sb-00000000-0000-0000-0000-000000000001/pty")
    assert nobodys[0] == 404
    assert not sockets.streams.asked
    status, headers, _ = await answer(sockets, upgrade=(*UPGRADE[:2], "Sec-WebSocket-Version: 8", UPGRADE[3]))
    assert (status, headers["sec-websocket-version"]) == (426, "13")


@pytest.mark.parametrize("query", ["token=x", "api_key=cap_x", "access_token=x", "TOKEN=x", "a=b", "offset=1", "token"])
async def test_no_token_in_the_url(sockets, query):
    """Nor anything else that is not known; nothing of it in the log."""
    status, _, error = await answer(sockets, f"exec/stream?{query}")
    assert (status, error["code"]) == (400, "invalid_request")
    assert "cap_x" not in json.dumps(sockets.events, default=str)


async def test_a_plain_get_is_told_to_upgrade(sockets, refused):
    """After it is known who asks, and for what."""
    for name in ("v1/sandboxes", "v1/capsules"):
        for route in ("exec/stream", "pty", "processes/1/stream", "files/watch"):
            response = await sockets.client.get(sockets.path(route, name))
            refused(response, 426, "upgrade_required")
            assert response.headers["upgrade"] == "websocket"
    path = sockets.path("pty")
    refused(await sockets.client.get(path, headers={"X-API-Key": "cap_x"}), 401, "unauthorized")
    refused(await sockets.client.get("/v1/sandboxes/sb-" + "0" * 8 + "/pty"), 400, "invalid_request")
    refused(await sockets.client.post(path), 405, "method_not_allowed")


async def test_an_origin_of_ours(sockets):
    """The page came from the host that it connects to."""
    async with sockets.open("pty", headers={"Origin": f"http://127.0.0.1:{sockets.port}"}) as ws:
        await ws.send(type="start")
        assert (await ws.receive())["type"] == "started"


async def test_a_token_in_the_first_message(sockets):
    """For browsers; then as if it had been a header."""
    async with sockets.open("pty", key=False) as ws:
        await ws.send(type="auth", token=sockets.key.replace("cap_", "e2b_"))
        await ws.send(type="start")
        assert (await ws.receive())["type"] == "started"


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ({"type": "auth", "token": "cap_" + "0" * 40}, 4401),
        ({"type": "auth", "token": "a b"}, 4401),
        ({"type": "auth", "token": "ey.x.y"}, 4401),
        ({"type": "auth", "token": ""}, 4400),
        ({"type": "auth"}, 4400),
        ({"type": "start", "cmd": "x"}, 4401),
        ({"type": "stop"}, 4401),
        ({"token": "x"}, 4401),
        (b"x", 4401),
    ],
)
async def test_a_bad_first_message(sockets, first, code):
    """Nothing is asked for before it is known by whom."""
    async with sockets.open("exec/stream", key=False) as ws:
        await (ws.send_bytes(first) if isinstance(first, bytes) else ws.send(**first))
        assert (await ws.closed())[0] == code
    assert not sockets.streams.asked


async def test_after_a_message_the_rest_is_found_out(sockets):
    """What a header would have been told with a status comes as a code."""
    paused = sockets.sandboxes.add(status="paused").id
    nobodys = "00000000-0000-0000-0000-000000000001"
    for sandbox, code in (("x", 4400), (f"sb-{nobodys}", 4404), (f"sb-{paused}", 4409)):
        sockets.sandbox = sandbox
        async with sockets.open("pty", key=False) as ws:
            await ws.send(type="auth", token=sockets.key)
            assert (await ws.closed())[0] == code


async def test_a_head_byte_by_byte(sockets):
    """However slowly, and with a frame right behind it."""
    async with await trio.open_tcp_stream("127.0.0.1", sockets.port) as stream:
        sent = head(sockets)
        for at in range(len(sent) - 5):
            await stream.send_all(sent[at : at + 1])
            if at % 50 == 0:
                await wait_all_tasks_blocked()
        start = b'{"type":"start","cmd":"x"}'
        await stream.send_all(sent[-5:] + bytes((0x81, 0x80 | len(start))) + b"\0\0\0\0" + start)
        received = b""
        with trio.fail_after(30):
            while b'"pid"' not in received:
                received += await stream.receive_some()
    assert received.startswith(b"HTTP/1.1 101 ")
    assert b"ermessage" not in received.lower()
    assert b"extensions" not in received.lower()


async def test_compression_is_never_agreed_to(sockets):
    """Offered by every browser; it would let a small message be a huge one."""
    offered = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
    async with await trio.open_tcp_stream("127.0.0.1", sockets.port) as stream:
        await stream.send_all(head(sockets, "exec/stream", offered))
        with trio.fail_after(30):
            received = await stream.receive_some()
    assert received.startswith(b"HTTP/1.1 101 ")
    assert b"permessage" not in received
