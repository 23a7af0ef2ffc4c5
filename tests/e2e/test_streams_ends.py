"""How streams end, and what lives on: clients that go, sandboxes that pause or end, daemons that die, rights that are
lost, idleness."""

from __future__ import annotations

import os
import signal

import httpx
import pytest
import trio

SHELL = {"cmd": "bash", "args": ["--norc"], "envs": {"PS1": "> ", "HISTFILE": ""}}
COUNT = "i=0; while :; do i=$((i+1)); printf '%09d\\n' $i; sleep 0.02; done"
LINE = 10
SHUT = 4409
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
AWAY = {4503, 1001, 1006}
"""Closes of a host, or a control plane, that went away."""


@pytest.fixture
def alive(run):
    """`alive(sandbox, "name")` → whether a process with that argument lives."""
    return lambda sandbox, name: run(sandbox, f"pgrep -fc '[s]leep {name}' || true")["stdout"] != "0\n"


async def _answer(console, line):
    """What a shell in a terminal prints for a line, without the echo."""
    await console.type(f"{line}; echo E''ND\r".encode())
    printed = await console.output(lambda data: b"END\r\n" in data, 20)
    return printed.split(b"E''ND\r\n")[-1].split(b"END\r\n")[0].decode().strip().splitlines()[-1:]


def _numbers(text):
    """That these are lines of COUNT, none missing or twice; the last."""
    found = [int(line) for line in text.split()]
    assert found == list(range(found[0], found[0] + len(found))), text[:200]
    return found[-1]


@pytest.mark.parametrize("how", ["cut", "closed"])
async def test_the_client_goes(create, connect, reach, alive, how):
    """What was attached ends with its client; a detached process and a terminal live on."""
    sandbox = create()
    async with (
        connect.exec(sandbox, "sleep 1001") as (attached, _),
        connect.exec(sandbox, "sleep 1002", detach=True) as (detached, _),
        connect.terminal(sandbox, cmd="sleep 1003") as (terminal, _),
    ):
        assert all(alive(sandbox, name) for name in ("1001", "1002", "1003"))
        if how == "cut":
            for console in (attached, detached, terminal):
                console.cut()
    await reach(lambda: not alive(sandbox, "1001"), 20, "an end of the attached one")
    assert alive(sandbox, "1002")
    assert alive(sandbox, "1003")


async def test_replay_from_where_one_was(create, connect):
    """Attached again with the count of bytes that one had, a process and a terminal go on there; after their end, too;
    who looks on takes nothing over; who takes over ends the one before."""
    sandbox = create()
    script = "for i in $(seq 1000 2999); do echo $i; done; read line; echo $line; exit 4"
    async with connect.exec(sandbox, script, detach=True, tag="job") as (console, started):
        assert started["tag"] == "job"
        had = await console.output(2000)
    had = had[:1998]
    async with connect(sandbox, f"processes/job/stream?offset={len(had)}") as again:
        start = await again.first("start")
        assert (start["tag"], start["offset"], start["skipped"], start["pty"]) == ("job", len(had), 0, False)
        had += await again.output(10_000 - len(had))
        async with connect(sandbox, "processes/job/stream?observe=true") as observer:
            assert (await observer.first("start"))["tag"] == "job"
            assert await observer.output(10_000) == had
            async with connect(sandbox, f"processes/job/stream?offset={len(had)}") as third:
                await third.first("start")
                await again.rest(20)
                assert again.closed[0] == SHUT, again.closed
                await third.say("stdin", data="the end\n")
                had += (await third.rest())[1]
                assert third.exit["exit_code"] == 4
            assert (await observer.rest())[1] == b"the end\n"
    assert had == b"".join(b"%d\n" % number for number in range(1000, 3000)) + b"the end\n"
    async with connect(sandbox, "processes/job/stream") as late:
        await late.first("start")
        assert (await late.rest())[1] == had
        assert (late.exit["exit_code"], late.closed) == (4, (1000, ""))


async def test_the_sandbox_is_paused(create, connect, api, reach, alive):
    """Every stream ends with 4409 and why. After the resume the shell of the terminal knows its variable, the detached
    process goes on, the attached one is gone."""
    sandbox = create()
    async with (
        connect.exec(sandbox, "sleep 1001") as (attached, _),
        connect.exec(sandbox, COUNT, detach=True, tag="count") as (detached, _),
        connect.terminal(sandbox, tag="shell", **SHELL) as (terminal, _),
        connect(sandbox, "files/watch") as watch,
    ):
        await watch.say("start", path="/root")
        await watch.first("started")
        assert await _answer(terminal, "X=kept; echo set") == ["set"]
        seen = await detached.output(20 * LINE)
        paused = await trio.to_thread.run_sync(api.post, f"/sandboxes/{sandbox['id']}/pause")
        assert paused.status_code == 200, paused.text
        for console in (attached, detached, terminal, watch):
            rest = await console.rest(20)
            seen += rest[1] if console is detached else b""
            assert console.closed[0] == SHUT, console.closed
            assert "paused" in console.closed[1], console.closed
            assert console.error["code"] == "invalid_state"
    assert api.get(f"/sandboxes/{sandbox['id']}/pty", headers=UPGRADE).status_code == 409
    assert api.post(f"/sandboxes/{sandbox['id']}/resume").status_code == 200
    async with connect.terminal(sandbox, tag="shell", offset=terminal.received) as (terminal, started):
        assert started["skipped"] == 0
        assert await _answer(terminal, "echo $X") == ["kept"]
    async with connect(sandbox, f"processes/count/stream?offset={len(seen)}") as again:
        assert (await again.first("start"))["skipped"] == 0
        seen += await again.output(20 * LINE)
    assert _numbers(seen[: len(seen) // LINE * LINE]) >= 40
    await reach(lambda: not alive(sandbox, "1001"), 20, "an end of the attached one")


async def test_the_sandbox_ends(create, connect, api):
    """Deleted in the middle: every stream is closed with a code and why, at once."""
    sandbox = create()
    async with (
        connect.exec(sandbox, COUNT) as (attached, _),
        connect.terminal(sandbox, **SHELL) as (terminal, _),
    ):
        await attached.output(LINE)
        assert (await trio.to_thread.run_sync(api.delete, f"/sandboxes/{sandbox['id']}")).status_code == 204
        for console in (attached, terminal):
            await console.rest(20)
            assert console.closed[0] in {SHUT, 4404}, console.closed
            assert console.error["data"], console.closed


@pytest.mark.parametrize("victim", ["agent_pids", "control_pids"])
async def test_a_daemon_is_killed(platform, create, connect, api, reach, alive, victim):
    """kill -9 of the agent, or of the control plane: streams end soon; what was attached is killed; the terminal and
    the detached process are attached to again, without a gap."""
    sandbox = create()
    async with (
        connect.exec(sandbox, "sleep 1001") as (attached, _),
        connect.exec(sandbox, COUNT, detach=True, tag="count") as (detached, _),
        connect.terminal(sandbox, tag="shell", **SHELL) as (terminal, _),
    ):
        assert await _answer(terminal, "X=kept; echo set") == ["set"]
        seen = await detached.output(20 * LINE)
        [before] = platform.ready[victim]
        os.kill(before, signal.SIGKILL)
        for console in (attached, detached, terminal):
            rest = await console.rest(20)
            seen += rest[1] if console is detached else b""
            assert console.closed[0] in AWAY, console.closed
    await reach(lambda: platform.ready.get(victim) not in ([before], [], None), 60, "its successor")
    await reach(lambda: _answers(api, sandbox), 60, "a sandbox that answers")
    async with connect.terminal(sandbox, tag="shell", offset=terminal.received) as (terminal, started):
        assert started["skipped"] == 0
        assert await _answer(terminal, "echo $X") == ["kept"]
    async with connect(sandbox, f"processes/count/stream?offset={len(seen)}") as again:
        assert (await again.first("start"))["skipped"] == 0
        seen += await again.output(20 * LINE)
    _numbers(seen[: len(seen) // LINE * LINE])
    await reach(lambda: not alive(sandbox, "1001"), 20, "an end of the attached one")


def _answers(api, sandbox):
    try:
        return api.post(f"/sandboxes/{sandbox['id']}/exec", json={"cmd": "true"}).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def stranger(platform):
    """Somebody with a sandbox, who reaches it by a key that `revoke()` ends: (sandbox, key, revoke)."""
    with httpx.Client(base_url=platform.ready["url"] + "/v1", timeout=60, trust_env=False) as web:
        account = {"email": "streams@example.org", "password": "correct horse battery staple", "name": "Ada"}
        web.headers["Authorization"] = f"Bearer {web.post('/auth/signup', json=account).json()['token']}"
        key = web.post("/api-keys", json={"name": "short"}).json()
        sandbox = web.post("/sandboxes", json={"memory_mb": 128}).json()
        yield sandbox, key["key"], lambda: web.delete(f"/api-keys/{key['id']}").raise_for_status()
        web.delete(f"/sandboxes/{sandbox['id']}")


async def test_what_time_does(create, connect, api, reach, stranger):
    """A revoked key's stream is closed within half a minute. An open stream keeps its sandbox from being paused for
    idleness; a detached process does not, and neither does a terminal that nobody looks at."""
    theirs, key, revoke = stranger
    idle = create(timeout_sec=8)

    def status():
        return api.get(f"/sandboxes/{idle['id']}").json()["status"]

    async with (
        connect.exec(theirs, "sleep 1000", key=key) as (revoked, _),
        connect.exec(idle, "sleep 1000") as (open_one, _),
    ):
        began = trio.current_time()
        revoke()
        await revoked.rest(45)
        print(f"closed {trio.current_time() - began:.0f} s after the key was revoked")  # noqa: T201 - a figure
        assert revoked.closed[0] == 4401, revoked.closed
        assert status() == "running"
        await open_one.say("stop")
        await open_one.rest(10)
    async with connect.exec(idle, "sleep 1002", detach=True), connect.terminal(idle, **SHELL):
        pass
    await reach(lambda: status() == "paused", 30, "a pause for idleness")
