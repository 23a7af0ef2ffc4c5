"""Every WebSocket and every kind of caller, by header and by first message, as the table of access has it."""

from __future__ import annotations

import json

import pytest
import trio
import trio_websocket

from capsule.http.sockets.operations import SocketOperation
from tests.people.stage import build

NAMES = ("execStream", "openTerminal", "attachProcess", "watchFiles")
START = {
    "execStream": {"type": "start", "cmd": "true"},
    "openTerminal": {"type": "start"},
    "attachProcess": {"type": "signal", "signal": "SIGURG"},
    "watchFiles": {"type": "start", "path": "/a"},
}
TWO_CREDENTIALS = frozenset({"bad key beside a good session", "key beside a session"})
RIGHT_AS_A_MESSAGE = frozenset({"session's token as a key", "key as a session"})
"""A message says no more than the token."""
CODES = {"unauthorized": 4401, "no_team": 4403, "forbidden": 4403, "not_found": 4404}


def test_these_are_all(route_table):
    """What is tested here is what is served."""
    rows = [row for row in route_table if isinstance(row, SocketOperation)]
    assert {row.alias_of or row.name for row in rows} == set(NAMES)
    assert len(rows) == 2 * len(NAMES)


async def _ask(people, path, headers, messages):
    """What the handshake was answered, or the code of the close frame after `messages`."""
    answer = None
    try:
        with trio.fail_after(60):
            answer = await _talk(people, path, headers, messages)
    except* trio_websocket.ConnectionRejected as group:
        [refused] = group.exceptions
        while isinstance(refused, ExceptionGroup):
            [refused] = refused.exceptions
        answer = refused.status_code, json.loads(refused.body)["error"]["code"]
    return answer


async def _talk(people, path, headers, messages):
    port, code, said = int(people.url.rpartition(":")[2]), None, []
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:
        ws = await trio_websocket.wrap_client_stream(
            nursery, stream, "127.0.0.1", path, extra_headers=list(headers.items())
        )
        try:
            for message in messages:
                await ws.send_message(json.dumps(message))
            while True:
                said.append(json.loads(await ws.get_message()))
        except trio_websocket.ConnectionClosed as closed:
            code = int(closed.reason.code)
        nursery.cancel_scope.cancel()
    return code, said[-1].get("code") if said else None


def _token(headers):
    [value] = headers.values()
    return value.removeprefix("Bearer ")


@pytest.mark.parametrize("name", NAMES)
async def test_who_may(people, matrix, route_table, name):
    """A header that will not do is refused before the upgrade, a message after it, with the same code; who may comes
    through to the played guest."""
    await matrix.begin(people)
    wrong, stage = [], None
    for row in (row for row in route_table if name == (row.alias_of or row.name)):
        for kind in matrix.kinds:
            if stage is None or kind.spoils:
                stage = await build(people, matrix._agent, matrix._host_token)
            headers = kind.headers(people, stage)
            headers = headers if isinstance(headers, dict) else await headers
            expected = matrix.expected(row, kind)
            path = stage.path(row.path)
            refusal = expected[0] if isinstance(expected, list) else None
            by_header = await _ask(people, path, headers, [START[name]])
            unknown = kind.credential in {"none", "host"}  # by the headers that are looked at
            if by_header != _wanted(refusal, upgraded=unknown):
                wrong.append(f"{row.path} by {kind.name}: {by_header}, not {refusal}")
            if headers and kind.name not in TWO_CREDENTIALS | RIGHT_AS_A_MESSAGE and "X-Host-Token" not in headers:
                auth = {"type": "auth", "token": _token(headers)}
                by_message = await _ask(people, path, {}, [auth, START[name]])
                if by_message != _wanted(refusal, upgraded=True):
                    wrong.append(f"{row.path} by {kind.name} in a message: {by_message}, not {refusal}")
            if kind.spoils:
                stage = None
    assert not wrong, "\n".join(wrong)


def _wanted(refusal, *, upgraded):
    if refusal is None:
        return 4409, "invalid_state"  # the played guest's answer
    status, code = refusal
    return (4000 + status, code) if upgraded else (status, code)


async def test_a_hosts_token_is_no_users(people, matrix, route_table):
    """Not in a message either."""
    await matrix.begin(people)
    stage = await build(people, matrix._agent, matrix._host_token)
    for row in (row for row in route_table if isinstance(row, SocketOperation)):
        auth = {"type": "auth", "token": stage.host_token}
        assert await _ask(people, stage.path(row.path), {}, [auth]) == (4401, "unauthorized")
