"""Live processes: what is asked of the host, what comes back, what every failure becomes; over a guest that talks."""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import product
from types import SimpleNamespace

import pytest
import trio

from agent.guest.fake import FakeGuest
from agent.guest.fake_programs import BOTH, RAW_CAT, TELL_SIZE
from agent.wire.faults import Fault, FaultCode
from agent.wire.limits import INITIAL_CREDIT
from capsule import errors
from capsule.model import ProcessExit, StreamCall, TerminalSize
from capsule.sandboxes import live as module
from capsule.sandboxes.live import LiveProcesses
from capsule.sandboxes.streams import Streams
from capsule.sandboxes.transfers import Transfers

SIZE = TerminalSize(80, 24)
ENDED = {"exit_code": 0, "duration_ms": 5, "timed_out": False}
ATTACHED = {"pid": 7, "tag": "t", "pty": False, "offset": 5, "skipped": 2}
RUBBISH = [None, True, -1, 2**64 - 1, 1.5, float("nan"), "x" * 200, b"x", [], {}, [[]], {"a": {}}]


def call(cmd="cat", **fields):
    return StreamCall(**{"cmd": cmd, "envs": {}, **fields})


@pytest.fixture
def streams(plane):
    links = plane.execs.links
    return Streams(rows=plane.sandboxes.rows, processes=LiveProcesses(links=links), transfers=Transfers(links=links))


@pytest.fixture
def start(world, streams, sandbox):
    """`async with start(cmd, …) as process`."""
    return lambda *args, **fields: streams.exec(world.principal, sandbox, call(*args, **fields))


@pytest.fixture
def attach(world, streams, sandbox):
    """`async with attach(process) as process`."""

    def attach(process, offset=None, *, observe=False):
        return streams.attach(world.principal, sandbox, process, offset=offset, observe=observe)

    return attach


@pytest.fixture
async def talking(agent, nursery):
    """A guest with processes."""
    guest = FakeGuest("fake")
    guest.processes.nursery = nursery
    agent.guest = guest.answer
    return guest


async def read(process, count):
    got = b""
    while len(got) < count:
        got += (await anext(process))[1]
    return got


async def soon(condition):
    with trio.fail_after(600):
        while not condition():
            await trio.sleep(0.1)


async def watched(opened):
    """From its first byte to its end."""
    async with opened as process:
        assert await anext(process) == (1, b"x")
        async for _ in process:
            pass


async def test_a_conversation(virtual_clock, start, talking):
    """Both ways, both channels, to the end and how it was."""
    async with start(BOTH) as process:
        assert (process.pid, process.tag, process.terminal, process.offset, process.skipped) == (7, "", False, 0, 0)
        for word in (b"a", b"\xff\x00", b"b" * 200_000):
            await process.send(word)
            assert await read(process, len(word)) == word
        await process.end()
        await process.end()
        assert [chunk async for chunk in process] == [(2, b"oops\n")]
        assert await process.exit() == ProcessExit(exit_code=3, duration_ms=0)
        with pytest.raises(errors.InvalidRequest):
            await process.send(b"x")
        await process.signal(9)


async def test_what_is_asked(virtual_clock, start, attach, agent, sandbox, talking):
    """The protocol's fields, `live` for the agent; absent ones are left out; tags are made up where one is needed."""
    async with start(args=(), envs={"A": "1"}, cwd="/tmp", user="me", timeout_sec=3, tag="mine"):
        pass
    async with start(detach=True):
        pass
    async with start(None, terminal=SIZE) as terminal:
        assert terminal.terminal
    async with attach(terminal.tag):
        pass
    async with attach(terminal.pid, 5, observe=True):
        pass
    common = {"sandbox_id": str(sandbox), "live": True, "envs": {}}
    plain, detached, pty, *attached = [body for method, body in agent.asked if method in {"exec", "processes.attach"}]
    assert plain == {
        **common,
        "cmd": "cat",
        "args": [],
        "envs": {"A": "1"},
        "cwd": "/tmp",
        "user": "me",
        "timeout_ms": 3000,
        "tag": "mine",
        "stdin": True,
    }
    assert re.fullmatch("exec-[0-9a-f]{8}", detached.pop("tag"))
    assert detached == {**common, "cmd": "cat", "stdin": True, "detach": True}
    assert re.fullmatch("pty-[0-9a-f]{8}", terminal.tag)
    assert pty == {**common, "pty": {"cols": 80, "rows": 24}, "tag": terminal.tag}
    assert attached == [
        {"sandbox_id": str(sandbox), "process": terminal.tag},
        {"sandbox_id": str(sandbox), "process": terminal.pid, "offset": 5, "observe": True},
    ]


async def test_leaving_and_coming_back(virtual_clock, start, attach, talking):
    """A plain process dies with its stream, a terminal does not: what it printed meanwhile is replayed."""
    async with start("sleep 1000"):
        assert len(talking.processes.living()) == 1
    await soon(lambda: not talking.processes.living())
    async with start(RAW_CAT, terminal=SIZE) as process:
        await process.end()
        await process.send(b"one")
        assert await read(process, 9) == b"ready\none"
        await process.send(b"two")
    async with attach(process.tag, 9) as again:
        assert (again.pid, again.tag, again.terminal) == (process.pid, process.tag, True)
        assert (again.offset, again.skipped, await read(again, 3)) == (9, 0, b"two")
        await again.signal(9)
        assert [chunk async for chunk in again] == []
        assert (await again.exit()).signal == 9


async def test_taken_over(virtual_clock, start, attach, talking):
    """Conflict that says so, to the reader and to who waits for the end; an observer sends nothing."""
    async with start(detach=True) as first, attach(first.tag, observe=True) as observer:
        for forbidden in (observer.send(b"x"), observer.resize(SIZE), observer.signal(9)):
            with pytest.raises(errors.InvalidRequest, match="only looks on"):
                await forbidden
        await observer.end()
        async with attach(first.tag) as second:
            for failing in (anext(first), first.exit()):
                with pytest.raises(errors.Conflict, match="somebody else") as caught:
                    await failing
                assert caught.value.extra == {"taken_over": True}
            await second.send(b"x")
            assert await anext(second) == await anext(observer) == (1, b"x")


async def test_sizes(virtual_clock, start, agent, talking):
    """Ten thousand at once: each returns at once, one call is under way at most, the last one is what stays."""
    async with start(TELL_SIZE, terminal=SIZE) as process:
        await read(process, 7)
        held = agent.hold("processes.resize")
        for number in range(10_000):
            await process.resize(TerminalSize(number % 100 + 1, number % 200 + 1))
        await soon(agent.reached["processes.resize"].is_set)
        held.set()
        agent.held.clear()
        await soon(lambda: talking.processes.all[process.pid].size == (100, 200))
        assert sum(method == "processes.resize" for method, _ in agent.asked) <= 3


async def test_a_size_that_did_not_get_through(virtual_clock, start, agent, talking):
    """What may pass is tried again, with the size of then; what will not is given up, and the stream goes on."""
    async with start(TELL_SIZE, terminal=SIZE) as process:
        busy = Fault(FaultCode.BUSY, "later", retryable=True)
        agent.faults["processes.resize"] = [busy, busy, busy, Fault(FaultCode.NOT_FOUND, "gone")]
        await process.resize(TerminalSize(1, 1))
        await soon(lambda: not agent.faults["processes.resize"])
        await trio.sleep(60)
        assert talking.processes.all[process.pid].size == (80, 24)
        agent.faults["processes.resize"] = [busy]
        await process.resize(TerminalSize(1, 1))
        await process.resize(TerminalSize(2, 3))
        await soon(lambda: talking.processes.all[process.pid].size == (2, 3))
    async with start() as process:
        with pytest.raises(errors.InvalidRequest, match="no terminal"):
            await process.resize(SIZE)


async def test_signals(virtual_clock, start, agent, talking):
    """Past input that waits; nothing to a process that has gone, but a sandbox that has gone is told; bounded."""
    async with start("sleep 1000") as process:
        with trio.move_on_after(5) as waiting:
            await process.send(b"x" * 2**20)
        assert waiting.cancelled_caught
        await process.signal(15)
        assert [chunk async for chunk in process] == []
        assert (await process.exit()).signal == 15
        await process.signal(15)
        gone = Fault(FaultCode.NOT_FOUND, "not here", details={"object": "sandbox"})
        agent.faults["processes.signal"] = [gone]
        with pytest.raises(errors.InvalidState):
            await process.signal(15)
        agent.hold("processes.signal")
        began = trio.current_time()
        with pytest.raises(errors.HostUnavailable):
            await process.signal(15)
        assert trio.current_time() - began < 15


@pytest.mark.parametrize("when", ["at once", "later"])
async def test_each_failure(virtual_clock, start, attach, guest, error_of, when):
    """The error of its kind, on entering or while it runs, to each who asks; a user that is not there is in the
    request."""
    for code, error in error_of.items():
        steps = [guest.notice(ATTACHED), guest.stdout(b"x")] if when == "later" else []
        guest.says(*steps, reply=Fault(code, f"{code} why", details={"status": "paused"}))
        first = when == "at once" and code == FaultCode.NOT_FOUND
        for opened, expected in ((start(), errors.InvalidRequest if first else error), (attach("t"), error)):
            with pytest.raises(expected, match=f"{code} why") as caught:
                await watched(opened)
            assert caught.value.extra == ({"status": "paused"} if code == FaultCode.INVALID_STATE else {})


async def test_the_connection_is_lost(virtual_clock, start, agent, talking):
    """HostUnavailable, to the reader, the sender, and who waits for the end: what came is not shown as if it were
    all."""
    async with start() as process:
        await process.send(b"x")
        assert await anext(process) == (1, b"x")
        agent.drop_connections()
        for failing in (anext(process), process.exit(), process.send(b"x" * 2**20)):
            with pytest.raises(errors.HostUnavailable):
                await failing


async def test_a_guest_that_says_nothing(virtual_clock, start, guest):
    """Bounded at the start; afterwards a quiet process may be quiet for hours."""
    guest.says(guest.pause(10**6), reply=ENDED)
    began = trio.current_time()
    with pytest.raises(errors.HostUnavailable, match="did not answer"):
        async with start():
            pytest.fail("it has begun")
    assert trio.current_time() - began == pytest.approx(module.START_SECONDS, abs=5)
    await soon(guest.cancelled.is_set)
    guest.says(guest.notice({"pid": 7}), guest.pause(10_000), reply=ENDED)
    async with start() as process:
        assert [chunk async for chunk in process] == []
        assert (await process.exit()).exit_code == 0


async def test_notices_and_ends_that_make_no_sense(virtual_clock, attach, start, guest):
    """A guest is its tenant's: a typed error or values of their type, never a bug of ours."""
    for key, value in product(ATTACHED, RUBBISH):
        guest.says(guest.notice({**ATTACHED, key: value}), reply=ENDED)
        with suppress(errors.HostUnavailable):
            async with attach("t") as process:
                assert type(process.pid) is int
                assert type(process.tag) is str
                assert type(process.terminal) is bool
                assert 0 <= process.offset < 2**63
                assert 0 <= process.skipped < 2**63
    for key, value in product([*ENDED, "signal"], RUBBISH):
        guest.says(guest.notice(ATTACHED), reply={**ENDED, key: value})
        with suppress(errors.HostUnavailable):
            async with attach("t") as process:
                ended = await process.exit()
                assert (type(ended.exit_code), type(ended.duration_ms), type(ended.timed_out)) == (int, int, bool)
    for first in (guest.notice(b"\xc1"), guest.notice([1]), guest.stdout(b"x"), guest.pause(0)):
        guest.says(first, reply=ENDED)
        with pytest.raises(errors.HostUnavailable, match="makes no sense"):
            async with start():
                pass


async def test_chunks_that_make_no_sense(virtual_clock, attach, start, guest):
    """Unknown channels, stderr of a terminal, notices that are none. An observer is told what he missed."""

    def on(channel):
        return lambda stream: stream.send(b"x", channel)

    for chunk in (on(0), on(4), on(255), guest.notice(b"x"), guest.notice({"skipped": -1})):
        guest.says(guest.notice(ATTACHED), chunk, reply=ENDED)
        with pytest.raises(errors.HostUnavailable, match="makes no sense"):
            async with attach("t") as process:
                await anext(process)
    guest.says(guest.notice({"pid": 7}), guest.stderr(b"x"), reply=ENDED)
    with pytest.raises(errors.HostUnavailable, match="makes no sense"):
        async with start(None, terminal=SIZE) as process:
            await anext(process)
    guest.says(guest.notice(ATTACHED), guest.notice({"skipped": 3}), guest.stdout(b"x"), reply=ENDED)
    async with attach("t", observe=True) as process:
        assert [chunk async for chunk in process] == [(1, b"x")]
        assert process.skipped == ATTACHED["skipped"] + 3


async def test_what_the_block_raises(virtual_clock, start, guest, talking):
    """Passes as it is, in no group; the process is cancelled all the same."""
    for error in (errors.Forbidden("no"), ValueError("x"), ExceptionGroup("two", [ValueError(), KeyError()])):
        with pytest.raises(type(error)) as caught:
            async with start("sleep 1000"):
                raise error
        assert caught.value is error


async def test_a_client_that_reads_nothing(virtual_clock, start, guest):
    """The process waits: here lies one window, whatever it prints."""
    sent = SimpleNamespace(bytes=0)

    async def pour(stream):
        while True:
            await stream.send(b"x" * 10_000, 1)
            sent.bytes += 10_000

    guest.says(guest.notice({"pid": 7}), pour, reply=ENDED)
    async with start() as process:
        await trio.sleep(600)
        assert sent.bytes <= INITIAL_CREDIT
        assert len(await read(process, 10**6)) >= 10**6
    await soon(guest.cancelled.is_set)


@pytest.mark.parametrize("terminal", [None, SIZE])
async def test_cancelled_at_any_moment(virtual_clock, start, talking, agent, interrupted, terminal):
    """Nothing is left: no stream on the link, no plain process in the guest. A terminal may stay, as it says."""

    async def work():
        async with start(RAW_CAT, terminal=terminal) as process:
            await process.send(b"one")
            await read(process, 9)
            if terminal:
                await process.resize(TerminalSize(1, 2))
            await process.signal(28)
            await process.end()
            if terminal:
                await process.signal(9)
            async for _ in process:
                pass
            await process.exit()

    for number in range(1, 200):
        if not await interrupted(work, number):
            break
        await soon(lambda: terminal or not talking.processes.living())
        for peer in agent._peers:
            await soon(lambda peer=peer: peer.link.open_streams() == 0)
    else:
        pytest.fail("it never came to its end")
    assert number > 5
