"""Consoles, terminals, attached processes and watches, as a client of ordinary manners sees them."""

from __future__ import annotations

import base64
import json
from functools import partial

import pytest
import trio

from capsule import errors
from capsule.http.server import serve
from capsule.http.sockets import websocket
from capsule.model import FileEvent, FileEvents

EXEC = "exec/stream"


async def test_a_command_with_its_streams(sockets):
    """What a client sends reaches the process, what it prints comes back, `exit` is last, and the close is 1000."""
    async with sockets.open(EXEC) as ws:
        await ws.send(type="start", cmd="cat", args=["-u"], envs={"A": "b"}, cwd="/tmp", user="root", timeout_sec=9)
        assert await ws.receive() == {"type": "start", "pid": 42, "tag": "p42"}
        process = sockets.streams.processes[0]
        call = process.call
        assert (call.cmd, call.args, call.envs, call.cwd, call.user) == ("cat", ("-u",), {"A": "b"}, "/tmp", "root")
        assert (call.timeout_sec, call.detach, call.terminal, call.tag) == (9, False, None, None)
        await ws.send(type="stdin", data="héllo\0")
        await ws.send(type="stdin", data_b64=base64.b64encode(b"\xff\n").decode())
        await ws.send(type="close_stdin")
        await sockets.until(lambda: process.input_ended)
        assert bytes(process.received) == "héllo\0".encode() + b"\xff\n"
        await process.say(b"out")
        await process.say(b"err", 2)
        assert await ws.receive() == {"type": "stdout", "data": "out"}
        assert await ws.receive() == {"type": "stderr", "data": "err"}
        process.finish(exit_code=3, duration_ms=8)
        assert await ws.receive() == {"type": "exit", "exit_code": 3, "duration_ms": 8}
        assert await ws.closed() == (1000, "")
    assert process.left.is_set()


async def test_defaults_of_a_command(sockets):
    """No time-out unless asked for; a shell line without args."""
    async with sockets.process(cmd="true") as (_, process):
        call = process.call
        assert (call.args, call.timeout_sec, call.cwd, call.user, call.envs) == (None, None, None, None, {})


async def test_characters_are_not_split(sockets):
    """A character's first byte waits for its rest; what is none comes as base64; the end of all of it comes, too."""
    async with sockets.process(cmd="x") as (ws, process):
        await process.say(b"a\xe2\x82")
        assert await ws.receive() == {"type": "stdout", "data": "a"}
        await process.say(b"\xacb\xffc")
        assert [await ws.receive() for _ in range(3)] == [
            {"type": "stdout", "data": "€b"},
            {"type": "stdout", "data_b64": "/w=="},
            {"type": "stdout", "data": "c"},
        ]
        await process.say(b"\xc3", 2)
        process.finish()
        assert await ws.receive() == {"type": "stderr", "data_b64": "ww=="}
        assert (await ws.receive())["type"] == "exit"


async def test_binary_framing(sockets):
    """The first byte names the stream, both ways."""
    async with sockets.process(cmd="x", framing="binary") as (ws, process):
        await ws.send_bytes(b"\0\xff\0in")
        await ws.send(type="stdin", data="put")
        await sockets.until(lambda: process.received == b"\xff\0input")
        await process.say(b"\xff\0", 2)
        assert await ws.receive() == b"\2\xff\0"
        await process.say(b"x")
        assert await ws.receive() == b"\1x"


async def test_signals_and_stop(sockets):
    """By name, by number; `stop` kills, and the exit says so."""
    async with sockets.process(cmd="x") as (ws, process):
        await ws.send(type="signal", signal="SIGINT")
        await ws.send(type="signal", signal=10)
        await ws.send(type="signal", signal="15")
        await ws.send(type="stop")
        assert await ws.receive() == {"type": "exit", "exit_code": 137, "signal": 9, "duration_ms": 3}
        assert await ws.closed() == (1000, "")
    assert process.signals == [2, 10, 15, 9]


async def test_control_does_not_wait_behind_input(sockets):
    """A process that does not read: a quarter of a mebibyte waits for it, a signal behind that is delivered."""
    async with sockets.process(cmd="x") as (ws, process):
        process.reads = trio.Event()
        for _ in range(4):
            await ws.send(type="stdin", data="x" * 65536)
        await ws.send(type="signal", signal="SIGINT")
        await sockets.until(lambda: process.signals == [2])
        process.reads.set()
        await sockets.until(lambda: len(process.received) == 4 * 65536)


async def test_input_beyond_that_waits_at_the_client(sockets, monkeypatch):
    """We stop reading, and pings find out that the client is gone all the same."""
    monkeypatch.setattr(websocket, "PING_INTERVAL", 0.5)
    async with sockets.process(cmd="x") as (ws, process):
        process.reads = trio.Event()
        sent = 0
        with trio.move_on_after(1) as scope:
            while True:
                await ws.send(type="stdin", data="x" * 65536)
                sent += 65536
        assert scope.cancelled_caught
        assert sent < 32 * 1024 * 1024
        ws.stream.socket.close()
    with trio.fail_after(30):
        await process.left.wait()


async def test_detached(sockets):
    """Said to the use-case, with the tag."""
    async with sockets.process(cmd="x", detach=True, tag="job") as (_, process):
        assert (process.call.detach, process.call.tag) == (True, "job")


@pytest.mark.parametrize("name", ["v1/sandboxes", "v1/capsules"])
async def test_a_terminal(sockets, name):
    """Bytes as they are both ways; its size and its end by message."""
    async with sockets.open("pty", name=name) as ws:
        await ws.send(type="start", cols=100, rows=30)
        assert await ws.receive() == {"type": "started", "tag": "p42", "pid": 42, "offset": 0, "skipped": 0}
        process = sockets.streams.processes[0]
        call = process.call
        assert (call.cmd, call.terminal.cols, call.terminal.rows, call.detach) == (None, 100, 30, True)
        await ws.send_bytes(b"ls\r\xff")
        await ws.send(type="resize", cols=10, rows=5)
        await sockets.until(lambda: process.received == b"ls\r\xff" and process.sizes == [(10, 5)])
        await process.say(b"\x1b[0m\xff")
        assert await ws.receive() == b"\x1b[0m\xff"
        await ws.send(type="kill")
        assert (await ws.receive())["exit_code"] == 137
        assert await ws.closed() == (1000, "")


async def test_a_terminal_in_json(sockets):
    """For clients without binary messages."""
    async with sockets.open("pty") as ws:
        await ws.send(type="start", framing="json")
        await ws.receive()
        process = sockets.streams.processes[0]
        await ws.send(type="input", data=base64.b64encode(b"\xffx").decode())
        await sockets.until(lambda: process.received == b"\xffx")
        await process.say(b"\xfe")
        assert await ws.receive() == {"type": "output", "data": "/g=="}
        await ws.send_bytes(b"x")
        assert (await ws.closed())[0] == 1003


async def test_a_terminal_again(sockets):
    """`connect` with what the client has; the size comes with it."""
    process = sockets.streams.add(tag="term", terminal=True, offset=7, skipped=2)
    async with sockets.open("pty") as ws:
        await ws.send(type="connect", tag="term", offset=5, cols=90, rows=20)
        assert await ws.receive() == {"type": "started", "tag": "term", "pid": 42, "offset": 7, "skipped": 2}
    assert sockets.streams.asked[-1][1][2:] == ("term", 5, False)
    assert process.sizes == [(90, 20)]


async def test_connecting_to_no_terminal(sockets):
    """Whoever wants a terminal gets one."""
    sockets.streams.add(tag="job")
    async with sockets.open("pty") as ws:
        await ws.send(type="connect", tag="job")
        assert (await ws.receive())["code"] == "invalid_request"
        assert (await ws.closed())[0] == 4400


async def test_attaching(sockets):
    """To what runs: the server speaks first, then it is as it was."""
    process = sockets.streams.add(tag="job", offset=3, skipped=1, replay=6)
    async with sockets.open("processes/job/stream?offset=2") as ws:
        hello = {"type": "start", "pid": 42, "tag": "job", "pty": False, "offset": 3, "skipped": 1}
        assert await ws.receive() == {**hello, "replay": 6, "ended": False}
        await ws.send(type="stdin", data="x")
        await ws.send(type="signal", signal="SIGHUP")
        await sockets.until(lambda: process.received == b"x" and process.signals == [1])
        await process.say(b"y")
        assert await ws.receive() == {"type": "stdout", "data": "y"}
    assert sockets.streams.asked[-1][1][2:] == ("job", 2, False)


async def test_attaching_to_a_terminal(sockets):
    """By pid; its bytes as at …/pty."""
    process = sockets.streams.add(terminal=True)
    async with sockets.open("processes/42/stream") as ws:
        assert (await ws.receive())["pty"] is True
        await ws.send_bytes(b"x")
        await ws.send(type="resize", cols=1, rows=1)
        await process.say(b"\xff")
        assert await ws.receive() == b"\xff"
        await sockets.until(lambda: process.received == b"x" and process.sizes)
    assert sockets.streams.asked[-1][1][2:] == (42, None, False)


@pytest.mark.parametrize("sent", [{"type": "stdin", "data": "x"}, {"type": "stop"}, b"x"])
async def test_an_observer_only_looks_on(sockets, sent):
    """Whatever it sends ends it; the process never sees that."""
    process = sockets.streams.add()
    async with sockets.open("processes/42/stream?observe=true") as ws:
        await ws.receive()
        await process.say(b"x")
        assert await ws.receive() == {"type": "stdout", "data": "x"}
        await (ws.send_bytes(sent) if isinstance(sent, bytes) else ws.send(**sent))
        assert (await ws.receive())["type"] == "error"
        assert (await ws.closed())[0] == 4400
    assert not process.received
    assert not process.signals


async def test_no_such_process(sockets):
    """Found out after the upgrade."""
    async with sockets.open("processes/nope/stream") as ws:
        assert await ws.receive() == {"type": "error", "code": "not_found", "data": "There is no such process."}
        assert await ws.closed() == (4404, "not_found: There is no such process.")


async def test_a_watch(sockets):
    """What happens is told, more than can be told is said, and the end has a reason."""
    sockets.sandboxes.files["/a"] = b""
    async with sockets.open("files/watch") as ws:
        await ws.send(type="start", path="/a", recursive=True)
        assert await ws.receive() == {"type": "started"}
        watched = sockets.streams.watched["/a"]
        seen = (
            FileEvent(event="write", path="/a"),
            FileEvent(event="rename", path="/a", to="/b", directory=True),
        )
        await watched.send(FileEvents(events=seen, overflow=True))
        assert [await ws.receive() for _ in range(3)] == [
            {"type": "event", "event": "write", "path": "/a"},
            {"type": "event", "event": "rename", "path": "/a", "to": "/b", "directory": True},
            {"type": "overflow"},
        ]
        watched.close()
        assert await ws.receive() == {"type": "end", "reason": "removed"}
        assert await ws.closed() == (1000, "")
    assert sockets.streams.asked[-1][1][2:] == ("/a", True)


async def test_a_watch_is_stopped(sockets):
    """By its client."""
    sockets.sandboxes.files["/a"] = b""
    async with sockets.open("files/watch") as ws:
        await ws.send(type="start", path="/a")
        await ws.receive()
        await ws.send(type="stop")
        assert await ws.closed() == (1000, "")


async def test_a_watch_of_nothing(sockets):
    """404, as everywhere."""
    async with sockets.open("files/watch") as ws:
        await ws.send(type="start", path="/nope")
        assert (await ws.receive())["code"] == "file_not_found"
        assert (await ws.closed())[0] == 4404


async def test_a_stream_that_breaks_says_why(sockets):
    """The sandbox was paused in the middle."""
    async with sockets.process(cmd="x") as (ws, process):
        await process.say(b"x")
        await ws.receive()
        await sockets.broken(process, errors.InvalidState("The sandbox was paused."))
        assert await ws.receive() == {"type": "error", "code": "invalid_state", "data": "The sandbox was paused."}
        assert await ws.closed() == (4409, "invalid_state: The sandbox was paused.")


async def test_a_bug_is_no_news_to_the_client(sockets):
    """1011, a traceback in the log, nothing of it outside."""
    async with sockets.process(cmd="x") as (ws, process):
        await sockets.broken(process, ValueError("secret"))
        assert (await ws.receive())["code"] == "internal"
        code, reason = await ws.closed()
        assert code == 1011
        assert "secret" not in reason
    assert [event["log_level"] for event in sockets.events if event["event"] == "stream_failed"] == ["error"]


async def test_the_client_closes(sockets):
    """Its process is let go, its code comes back."""
    async with sockets.process(cmd="x") as (ws, process):
        await ws.close(4321)
        await process.left.wait()
        assert await ws.closed() == (4321, "")


async def test_the_client_is_gone(sockets):
    """Without a close frame: the same for the process."""
    async with sockets.process(cmd="x") as (ws, process):
        ws.stream.socket.close()
        with trio.fail_after(30):
            await process.left.wait()


async def test_an_end_is_counted_and_logged(sockets):
    """The gauge while it is open, the counter and one event at its end."""
    value = sockets.registry.get_sample_value
    async with sockets.process(cmd="x") as (ws, process):
        assert value("capsule_http_streams", {"kind": "execStream"}) == 1
        process.finish()
        await ws.closed()
    await sockets.until(lambda: value("capsule_http_streams", {"kind": "execStream"}) == 0)
    assert value("capsule_http_streams_ended_total", {"kind": "execStream", "code": "1000"}) == 1
    [ended] = [event for event in sockets.events if event["event"] == "stream_ended"]
    assert ended["route"] == "/v1/sandboxes/{sandbox_id}/exec/stream"
    assert ended["code"] == 1000
    assert ended["bytes_in"] > 10
    assert ended["bytes_out"] > 10
    [request] = [event for event in sockets.events if event["event"] == "http_request"]
    assert (request["status"], request["route"]) == (101, ended["route"])
    assert sockets.key not in json.dumps(sockets.events, default=str)


async def test_shutdown_closes_sockets_at_once(sockets):
    """1001, long before the grace runs out."""
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        task = partial(serve, sockets.app, ("127.0.0.1", 0), shutdown=shutdown, grace=1000)
        sockets.port = await nursery.start(task)
        with trio.fail_after(60):
            async with sockets.process(cmd="x") as (ws, process):
                shutdown.set()
                assert (await ws.closed())[0] == 1001
                await process.left.wait()
