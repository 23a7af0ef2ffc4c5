"""Commands in sandboxes: what comes back, what every failure becomes, and that nothing is kept of any of it."""

from __future__ import annotations

from contextlib import suppress
from itertools import product

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from capsule import errors
from capsule.model import ExecCall, ExecStarted
from capsule.sandboxes import execs as module

ENDED = {"exit_code": 0, "duration_ms": 5, "timed_out": False}
PROCESS = {"pid": 7, "tag": "t", "cmd": "sleep 9", "user": "root", "cwd": "/", "background": True, "started_ns": 1}
RUBBISH = [None, True, -1, 2**64 - 1, 1.5, float("inf"), float("nan"), "x", b"x", [], {}, [[]], {"a": {}}]


def call(**fields):
    return ExecCall(**{"cmd": "true", "envs": {}, **fields})


@pytest.fixture
def run(world, plane, sandbox):
    """Runs a command; whatever came of it, the budget of all is whole again."""

    async def run(**fields):
        try:
            return await plane.sandboxes.exec(world.principal, sandbox, call(**fields))
        finally:
            assert plane.execs.budget.held == 0

    return run


async def test_output_and_exit_code(virtual_clock, world, guest, run, sandbox):
    """Both streams as the bytes they are, UTF-8 or not, whatever comes in between."""
    guest.says(
        guest.notice({"pid": 7, "tag": "t"}),
        guest.stdout(b"\xff\x00"),
        guest.stderr(b"\xc3"),
        guest.stdout(b"out"),
        guest.stderr(b"\xa4"),
        guest.notice(b"\xc1 no msgpack, and of no interest"),
        reply={"exit_code": 137, "signal": 9, "duration_ms": 12, "timed_out": False},
    )
    result = await run(args=("a", ""), envs={"A": "1"}, cwd="/tmp", user="me", tag="t", stdin=b"", timeout_sec=3)
    assert (result.stdout, result.stderr, result.exit_code, result.duration_ms) == (
        b"\xff\x00out",
        b"\xc3\xa4",
        137,
        12,
    )
    assert guest.asked == [
        (
            "exec",
            {
                "sandbox_id": str(sandbox),
                "cmd": "true",
                "args": ["a", ""],
                "envs": {"A": "1"},
                "stdin": True,
                "background": False,
                "timeout_ms": 3000,
                "cwd": "/tmp",
                "user": "me",
                "tag": "t",
            },
        )
    ]


async def test_each_failure(virtual_clock, guest, run, error_of):
    """The error of its kind, with output or without; what exec does not find is in the request."""
    for code, error in {**error_of, FaultCode.NOT_FOUND: errors.InvalidRequest}.items():
        guest.says(guest.stdout(b"x" * 1000), reply=Fault(code, f"{code} why", details={"status": "stopping"}))
        with pytest.raises(error, match=f"{code} why") as caught:
            await run()
        assert caught.value.extra == ({"status": "stopping"} if code == FaultCode.INVALID_STATE else {})


async def test_the_time_out(virtual_clock, guest, run):
    """408 with what was printed so far; the guest says that it has killed it."""
    guest.says(
        guest.stdout(b"so far"),
        guest.stderr(b"oops"),
        reply={"exit_code": 137, "signal": 9, "duration_ms": 2001, "timed_out": True},
    )
    with pytest.raises(errors.ExecTimeout, match="2 s") as caught:
        await run(timeout_sec=2)
    error = caught.value
    assert (error.stdout, error.stderr, error.duration_ms) == (b"so far", b"oops", 2001)


async def test_a_guest_that_does_not_keep_the_time_out(virtual_clock, guest, run):
    """We do: 408 with the output when the command ran, 503 when nobody knows; the process is cancelled."""
    guest.says(guest.notice({"pid": 7, "tag": "t"}), guest.stdout(b"so far"), guest.pause(10**6), reply=ENDED)
    with pytest.raises(errors.ExecTimeout) as caught:
        await run(timeout_sec=2)
    assert caught.value.stdout == b"so far"
    assert caught.value.duration_ms == pytest.approx(62_000, abs=3000)
    assert guest.cancelled.is_set()
    guest.says(guest.pause(10**6), reply=ENDED)
    with pytest.raises(errors.HostUnavailable):
        await run(timeout_sec=2)


async def test_too_much_output(virtual_clock, world, guest, run, monkeypatch):
    """Exactly the limit is fine, one byte more is 413 with the beginning of both, and the process is cancelled."""
    monkeypatch.setattr(module, "MAX_OUTPUT_BYTES", 300_000)
    guest.says(guest.stdout(b"o" * 200_000), guest.stderr(b"e" * 100_000), reply=ENDED)
    result = await run()
    assert len(result.stdout) + len(result.stderr) == 300_000
    guest.says(
        guest.stdout(b"o" * 200_000), guest.stderr(b"e" * 100_000), guest.stderr(b"!"), guest.pause(10**6), reply=ENDED
    )
    with pytest.raises(errors.OutputTooLarge) as caught:
        await run()
    assert (caught.value.stdout, caught.value.stderr) == (b"o" * 65536, b"e" * 65536)
    with trio.fail_after(30):
        await guest.cancelled.wait()


async def test_the_limit_is_ten_mebibytes(virtual_clock, guest, run):
    """A flood is cut off, not collected."""
    guest.says(*[guest.stdout(b"o" * 2**20)] * 11, reply=ENDED)
    with pytest.raises(errors.OutputTooLarge):
        await run()


async def test_the_budget_of_all(virtual_clock, world, guest, plane, sandbox, monkeypatch, nursery):
    """Many floods at once: those beyond the budget are 503 `busy`; it is given back, also by a client that left."""
    monkeypatch.setattr(plane.execs.budget, "_limit", 125_000)
    guest.says(guest.stdout(b"o" * 50_000), guest.pause(30), reply=ENDED)  # in one piece: it fits whole, or not at all
    outcomes = []

    async def run():
        try:
            outcomes.append(len((await plane.sandboxes.exec(world.principal, sandbox, call())).stdout))
        except errors.Busy:
            outcomes.append("busy")

    with trio.CancelScope() as leaving:
        async with trio.open_nursery() as floods:
            for _ in range(5):
                floods.start_soon(run)
            await trio.sleep(10)
            assert outcomes == ["busy"] * 3
            assert 100_000 <= plane.execs.budget.held <= 125_000
            leaving.cancel()
    assert plane.execs.budget.held == 0


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 3 * 2**20])
async def test_stdin_arrives_whole(virtual_clock, guest, run, size):
    """Also beyond the credit of the stream, to a process that takes its time."""
    guest.says(guest.pause(5), guest.read(), guest.stdout(b"done"), reply=ENDED)
    data = bytes(range(256)) * (size // 256) + b"!" * (size % 256)
    assert (await run(stdin=data)).stdout == b"done"
    assert guest.received == data
    assert guest.asked[0][1]["stdin"] is True


async def test_stdin_that_nobody_reads(virtual_clock, guest, run):
    """More than the credit, and the process ends without a look at it: its outcome comes all the same."""
    guest.says(guest.stdout(b"x" * 400_000), guest.pause(1), reply={**ENDED, "exit_code": 3})
    result = await run(stdin=b"i" * 2**20)
    assert (result.exit_code, len(result.stdout)) == (3, 400_000)
    guest.says(reply=Fault(FaultCode.TOO_MANY_PROCESSES, "full"))
    with pytest.raises(errors.TooManyExecs):
        await run(stdin=b"i" * 2**20)


async def test_the_client_goes_away(virtual_clock, world, guest, plane, sandbox):
    """The process goes with it."""
    guest.says(guest.stdout(b"x" * 1000), guest.pause(10**6), reply=ENDED)
    with trio.move_on_after(5):
        await plane.sandboxes.exec(world.principal, sandbox, call(stdin=b"i" * 2**20))
    assert plane.execs.budget.held == 0
    with trio.fail_after(30):
        await guest.cancelled.wait()


async def test_the_connection_is_lost(virtual_clock, guest, run, agent):
    """503; output that came is not shown as if it were all."""

    async def cut(stream):
        stream._peer.close("cut")
        await trio.sleep_forever()

    guest.says(guest.stdout(b"half"), cut, reply=ENDED)
    with pytest.raises(errors.HostUnavailable):
        await run()


async def test_in_the_background(virtual_clock, guest, run):
    """The answer comes when it runs; there is no time-out to pass on."""
    guest.says(reply={"pid": 7, "tag": "job"})
    assert await run(background=True, timeout_sec=None) == ExecStarted(7, "job")
    assert "timeout_ms" not in guest.asked[0][1]


async def test_an_outcome_that_makes_no_sense(virtual_clock, guest, run):
    """A guest is its tenant's: a typed error, never a bug of ours."""
    for key, value in product(ENDED, RUBBISH):
        guest.says(reply={**ENDED, key: value})
        with suppress(errors.HostUnavailable, errors.ExecTimeout):
            result = await run()
            assert type(result.exit_code) is int
            assert 0 <= result.exit_code <= 255


@pytest.mark.parametrize("missing", ["exit_code", "pid", "tag"])
async def test_an_outcome_that_is_missing(virtual_clock, guest, run, missing):
    guest.says(reply={key: value for key, value in {**ENDED, "pid": 1, "tag": "t"}.items() if key != missing})
    with pytest.raises(errors.HostUnavailable, match="makes no sense"):
        await run(background=missing != "exit_code")


async def test_processes_that_make_no_sense(virtual_clock, world, guest, plane, sandbox):
    """As above, for the list."""
    for key, value in product([*PROCESS, "args", "processes"], RUBBISH):
        guest.says(reply={"processes": value} if key == "processes" else {"processes": [{**PROCESS, key: value}]})
        with suppress(errors.HostUnavailable):
            for one in await plane.sandboxes.processes(world.principal, sandbox):
                assert type(one.pid) is int
                assert one.pid > 0
                assert type(one.cmd) is str


async def test_processes(virtual_clock, world, guest, plane, sandbox):
    """The list, and signals by pid and tag; one that is not there is 404."""
    guest.says(reply={"processes": [PROCESS, {"pid": 8, "cmd": "x", "args": ["y"]}]})
    one, other = await plane.sandboxes.processes(world.principal, sandbox)
    assert (one.pid, one.tag, one.args, other.args) == (7, "t", None, ("y",))
    guest.says(reply={})
    for process in (7, "t"):
        await plane.sandboxes.signal_process(world.principal, sandbox, process, 9)
    assert [body["process"] for method, body in guest.asked if method == "processes.signal"] == [7, "t"]
    guest.says(reply=Fault(FaultCode.NOT_FOUND, "no such process"))
    with pytest.raises(errors.NotFound):
        await plane.sandboxes.signal_process(world.principal, sandbox, 1, 9)


async def test_ping(virtual_clock, world, agent, plane, sandbox):
    """Resets the clock in the row and on the host."""
    await world.sql("update sandboxes set last_active_at = now() - interval '1 hour'")
    before = (await world.row(sandbox)).last_active_at
    await plane.sandboxes.ping(world.principal, sandbox)
    assert (await world.row(sandbox)).last_active_at > before
    assert agent.asked == [("sandbox.ping", {"sandbox_id": str(sandbox)})]
