"""Requests: typed answers and errors, what is sent again and what never is, and where credentials never are."""

from __future__ import annotations

import gc
import logging
import traceback

import httpx
import pytest
import trio

from capsule import errors as server
from capsule.client import (
    ApiError,
    CommandFailed,
    ConfigurationError,
    ConnectionLost,
    ExecTimeout,
    Forbidden,
    InvalidRequest,
    InvalidState,
    NotFound,
    TrioClient,
    Unauthorized,
    Unavailable,
)


async def test_a_sandbox_is_made_found_and_listed(platform):
    """What is made has the server's description; lists go through all pages."""
    made = await platform.client.sandboxes.create(metadata={"job": "7"}, timeout_sec=60)
    assert made.status == "running"
    assert made.info.metadata == {"job": "7"}
    assert made.info.created_at.utcoffset() is not None
    assert (await platform.client.sandboxes.get(made.id)).info == made.info
    for _ in range(450):
        platform.sandboxes.add()
    found = [sandbox.id async for sandbox in platform.client.sandboxes.list()]
    assert len(found) == len(set(found)) == 452
    assert [one.id async for one in platform.client.sandboxes.list(status=["paused", "error"])] == []


async def test_commands_run(platform):
    """Text and bytes come back as bytes; a failure is one only if it is asked for."""
    sandbox = platform.sandbox
    result = await sandbox.exec("echo", ["hi"], stdin="x", cwd="/tmp")
    assert (result.stdout, result.text, result.exit_code) == (b"hi\n", "hi\n", 0)
    platform.sandboxes.result = platform.model.result(stdout=b"\xff\x00", stderr=b"no\n", exit_code=2, duration_ms=1)
    assert (await sandbox.exec("x")).stdout == b"\xff\x00"
    with pytest.raises(CommandFailed, match="no") as caught:
        await sandbox.exec("x", check=True)
    assert caught.value.result.exit_code == 2
    assert (await sandbox.start("sleep 9", tag="nap")).tag == "nap"
    with pytest.raises(ValueError, match="stream"):
        await sandbox.exec("cat", stdin=b"\xff")


async def test_errors_have_their_classes(platform):
    """Code, message, request id and what else the server said; a time-out with its output."""
    with pytest.raises(NotFound) as caught:
        await platform.client.sandboxes.create("nothing-like-it")
    assert (caught.value.status, caught.value.code) == (404, "not_found")
    assert caught.value.request_id
    failures = platform.sandboxes.failures
    failures["exec"] = server.ExecTimeout("too long", stdout=b"\xff part", stderr=b"", duration_ms=1000)
    with pytest.raises(ExecTimeout) as late:
        await platform.sandbox.exec("sleep 99", timeout_sec=1)
    assert (late.value.stdout, late.value.stderr, late.value.duration_ms) == (b"\xff part", b"", 1000)
    failures["pause"] = server.InvalidState("it is stopping", status="stopping")
    with pytest.raises(InvalidState) as state:
        await platform.sandbox.pause()
    assert state.value.details == {"status": "stopping"}
    failures["create"] = server.QuotaExceeded("enough", limit="vcpus")
    with pytest.raises(Forbidden, match="quota_exceeded"):
        await platform.client.sandboxes.create()


async def test_a_create_is_sent_again_with_its_key(platform, quick):
    """The answer is lost twice: the same key comes three times, so the server makes one sandbox."""
    platform.relay.allowance = [0, 0]
    await platform.relay.cut()
    await platform.client.sandboxes.create()
    keys = [arguments[-1] for method, arguments in platform.sandboxes.asked if method == "create"]
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert len(keys[0]) > 30
    await platform.client.sandboxes.create(idempotency_key="mine")
    assert platform.sandboxes.asked[-1][1][-1] == "mine"


async def test_a_command_is_never_sent_again(platform, quick):
    """It may have run."""
    await platform.relay.cut()
    platform.relay.allowance = [0]
    with pytest.raises(ConnectionLost):
        await platform.sandbox.exec("rm -r /tmp/x")
    assert [method for method, _ in platform.sandboxes.asked].count("exec") == 1
    platform.sandboxes.failures["exec"] = server.Busy("wait", retry_after=1)
    with pytest.raises(Unavailable):
        await platform.sandbox.exec("x")
    assert [method for method, _ in platform.sandboxes.asked].count("exec") == 2


async def test_patience_ends(platform, quick, monkeypatch):
    """A 503 that says when is waited for, a few times; one that does not, or asks for minutes, is the caller's."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr("capsule.client.transport.trio.sleep", sleep)
    platform.sandboxes.failures["get"] = server.Busy("wait", retry_after=2)
    with pytest.raises(Unavailable):
        await platform.sandbox.refresh()
    assert slept == [2, 2, 2]
    for failure in (server.Busy("wait"), server.Busy("wait", retry_after=300)):
        platform.sandboxes.failures["get"] = failure
        with pytest.raises(Unavailable):
            await platform.sandbox.refresh()
    assert len(slept) == 3


async def test_what_a_lost_create_has_begun_is_waited_for(platform, quick, monkeypatch):
    """The server says `busy` while it makes the sandbox: longer than a few attempts, and not for ever."""
    asked, slept = [], []

    async def sleep(seconds):
        slept.append(seconds)

    async def busy(*_):
        asked.append(True)
        if len(asked) < 10:
            raise server.Busy("still being made", retry_after=5)

    monkeypatch.setattr("capsule.client.transport.trio.sleep", sleep)
    monkeypatch.setattr("capsule.client.transport.trio.current_time", lambda: sum(slept))
    platform.sandboxes._enter = busy
    assert (await platform.client.sandboxes.create()).status == "running"
    assert len(asked) == 10
    slept.clear()
    platform.sandboxes._enter = lambda *_: busy(asked.clear())
    with pytest.raises(Unavailable):
        await platform.client.sandboxes.create()
    assert 140 <= sum(slept) <= 170


async def test_a_server_that_is_not_there_is_named_so(quick):
    """A closed port: ConnectionLost, after a few attempts."""
    async with TrioClient("http://127.0.0.1:9", "cap_" + "0" * 40) as client:
        with pytest.raises(ConnectionLost, match="not reached"):
            await client.sandboxes.get("sb-1")


async def test_no_key_gets_out(platform, caplog, quick):
    """No repr, message, traceback, chained exception or log record has the credential."""
    caplog.set_level(logging.DEBUG)
    await platform.relay.cut()
    platform.relay.allowance = [0] * 20
    said = [repr(platform.client), repr(vars(platform.client)), repr(vars(platform.client._transport))]
    for call in (platform.sandbox.refresh, platform.sandbox.ping):
        with pytest.raises(ConnectionLost) as caught:
            await call()
        said.append("".join(traceback.format_exception(caught.value)))
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
    platform.relay.allowance = []
    async with TrioClient(platform.url, "cap_" + "9" * 40) as stranger:
        with pytest.raises(Unauthorized) as refused:
            await stranger.sandboxes.get(platform.sandbox.id)
        said.append("".join(traceback.format_exception(refused.value)))
    async with platform.sandbox.stream("x"):
        pass
    with pytest.raises(NotFound) as refused:
        async with platform.sandbox.attach("nobody"):
            pass
    said += ["".join(traceback.format_exception(refused.value)), caplog.text]
    assert not [text for text in said if platform.key in text or "9" * 40 in text]


async def test_without_credentials_nothing_is_asked(platform):
    """The message says what to do; the server hears nothing."""
    async with TrioClient(platform.url) as client:
        before = platform.relay.count
        with pytest.raises(ConfigurationError, match="capsule login"):
            await client.sandboxes.get("sb-1")
        with pytest.raises(ConfigurationError, match="capsule login"):
            async with (await _sandbox_of(platform, client)).stream("x"):
                pass
        assert platform.relay.count == before


async def _sandbox_of(platform, client):
    await trio.lowlevel.checkpoint()
    return type(platform.sandbox)(client._transport, platform.sandbox.info)


async def test_processes_and_lives(platform):
    """Listing over pages, signals, pause, resume, fork, snapshots, and an end that may come twice."""
    sandbox = platform.sandbox
    for pid in range(1, 320):
        platform.sandboxes.run(pid, f"t{pid}")
    assert [one.pid for one in await sandbox.processes.list()] == list(range(1, 320))
    await sandbox.processes.signal("t9")
    assert platform.sandboxes.asked[-1][1][-2:] == ("t9", 15)
    with pytest.raises(InvalidRequest):
        await sandbox.processes.signal("..")
    await sandbox.pause()
    assert sandbox.status == "paused"
    await sandbox.resume()
    children = await sandbox.fork(3)
    assert [getattr(child, "code", "made") for child in children] == ["made", "made", "no_hosts_available"]
    assert (await sandbox.snapshot("golden")).name == "golden"
    assert "frozen" in {template.name async for template in platform.client.templates.list()}
    await sandbox.ping()
    await sandbox.delete()
    await sandbox.delete()


async def test_answers_of_a_newer_server_and_of_no_server(monkeypatch):
    """Unknown fields are ignored; what is no answer of ours is an error of ours."""
    answers = [
        httpx.Response(200, json={"name": "x", "type": "odd", "size_bytes": 1, "platform": True, "new": [1],
                                  "created_at": "2026-01-02T03:04:05.678901Z"}),
        httpx.Response(200, text="<html>"),
        httpx.Response(502, text="<html>bad gateway"),
        httpx.Response(301, headers={"Location": "https://there.example/v1/snapshots"}),
    ]  # fmt: skip
    async with TrioClient("http://127.0.0.1:1", "cap_" + "0" * 40) as client:
        client._transport._client._transport = httpx.MockTransport(lambda _: answers.pop(0))
        made = await client.templates.create("sb-1", "x")
        assert made.type == "odd"
        with pytest.raises(Exception, match="not one that this version understands"):
            await client.templates.create("sb-1", "x")
        with pytest.raises(ApiError) as caught:
            await client.templates.create("sb-1", "x")
        assert (caught.value.status, caught.value.code) == (502, "unknown")
        with pytest.raises(ApiError, match=r"https://there\.example"):
            await client.templates.create("sb-1", "x")
    gc.collect()
