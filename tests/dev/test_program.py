"""Programs of `capsule dev`, with real processes: started again, stopped in order, never left behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import trio

from capsule.dev import program as module
from capsule.dev.program import Program

SAY_SO = "import signal, sys, pathlib; pathlib.Path({0!r}).touch(); [signal.pause() for _ in iter(int, 1)]"
OBEYS = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); " + SAY_SO
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); " + SAY_SO


@pytest.fixture
def started(tmp_path):
    return tmp_path / "started"


@pytest.fixture
def make(started):
    """A program of one line of Python, and its pids in the order they came."""

    def make(code, environment=None):
        pids = []

        async def nothing_special():
            await trio.lowlevel.checkpoint()
            return dict(os.environ)

        program = Program(
            "test",
            [sys.executable, "-S", "-c", code.format(str(started))],
            environment or nothing_special,
            lambda: pids.append(program.pid),
        )
        return program, pids

    return make


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_runs_in_a_session_of_its_own_until_stopped(make, started, until):
    """Ctrl-C in the terminal is not its business; SIGTERM ends it, `run` returns, it is not started again."""
    program, pids = make(OBEYS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(program.run)
        await until(lambda: started.exists() and program.pid)  # it may say so before we know it
        assert pids == [program.pid]
        assert os.getsid(program.pid) == program.pid != os.getsid(0)
        await program.stop(20)
    assert not alive(pids[0])
    assert program.pid is None
    assert len(pids) == 1


async def test_is_started_again_with_growing_pauses(make, until, monkeypatch):
    """Each death is followed by a start, the pauses double up to their bound."""
    pauses = []
    delay = module.RESTART.delay

    class Policy:
        def delay(self, failures):
            pauses.append((failures, delay(failures)))
            return 0

    monkeypatch.setattr(module, "RESTART", Policy())
    program, pids = make("raise SystemExit(3)")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(program.run)
        await until(lambda: len(pids) >= 4)
        await program.stop(5)
    assert len(set(pids)) == len(pids)
    seen = dict(pauses)
    assert [seen[n] for n in (1, 2, 3)] == [0.1, 0.2, 0.4]
    assert delay(50) == 5.0


async def test_a_steady_life_is_forgiven(make, until, monkeypatch):
    """After a while of good service the next death counts as the first."""
    monkeypatch.setattr(module, "STEADY", 0.0)
    counted = []

    class Policy:
        def delay(self, failures):
            counted.append(failures)
            return 0

    monkeypatch.setattr(module, "RESTART", Policy())
    program, pids = make("pass")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(program.run)
        await until(lambda: len(pids) >= 3)
        await program.stop(5)
    assert set(counted) == {1}


async def test_a_killed_one_is_replaced(make, started, until):
    """kill -9 by anybody: there is another one, and its pid is told."""
    program, pids = make(OBEYS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(program.run)
        await until(lambda: started.exists() and program.pid)
        started.unlink()
        os.kill(pids[0], signal.SIGKILL)
        await until(lambda: started.exists() and program.pid)
        assert program.pid == pids[1] != pids[0]
        await program.stop(20)


async def test_one_that_does_not_hear_is_killed_after_the_patience(make, started, until):
    """SIGKILL, not before."""
    program, pids = make(DEAF)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(program.run)
        await until(lambda: started.exists() and program.pid)
        began = trio.current_time()
        with trio.fail_after(20):
            await program.stop(0.2)
        assert trio.current_time() - began >= 0.2
    assert not alive(pids[0])


async def test_cancellation_kills_it(make, started, until):
    """Nothing is left behind, deaf or not."""
    program, pids = make(DEAF)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(program.run)
        await until(lambda: started.exists() and program.pid)
        nursery.cancel_scope.cancel()
    assert not alive(pids[0])


async def test_stopped_while_it_waits_to_be_started_again(make, until, monkeypatch):
    """The pause ends at once."""
    monkeypatch.setattr(module, "RESTART", module.RestartPolicy(first_delay=1000, max_delay=1000))
    program, pids = make("pass")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(program.run)
            await until(lambda: pids and program.pid is None)
            await program.stop(1000)
    assert len(pids) == 1


async def test_stopped_while_its_environment_is_prepared(make):
    """It is not started after it was stopped."""
    asked = trio.Event()

    async def never():
        asked.set()
        await trio.sleep_forever()

    program, pids = make("pass", never)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(program.run)
            await asked.wait()
            await program.stop(1000)
    assert pids == []


async def test_stopped_between_its_environment_and_its_start(make):
    """The environment is there, its start is the next step: there is none."""
    asked, there = trio.Event(), trio.Event()

    async def environment():
        asked.set()
        await there.wait()
        return dict(os.environ)

    program, pids = make("import signal; signal.pause()", environment)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(program.run)
            await asked.wait()
            there.set()
            await program.stop(1000)
    assert pids == []


async def test_stopped_while_it_is_being_started(make, monkeypatch):
    """The process that comes into being meanwhile is stopped like any other."""
    opening, go_on = trio.Event(), trio.Event()
    open_process = trio.lowlevel.open_process

    async def slowly(*args, **kwargs):
        process = await open_process(*args, **kwargs)
        opening.set()
        await go_on.wait()
        return process

    monkeypatch.setattr(trio.lowlevel, "open_process", slowly)
    program, pids = make("import signal; signal.pause()")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(program.run)
            await opening.wait()
            nursery.start_soon(program.stop, 1000)
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
    assert len(pids) == 1
    assert not alive(pids[0])


async def test_the_environment_is_asked_for_at_each_start(make, tmp_path, until):
    """An agent that lost its credentials gets a new token."""
    count = iter(range(1000))

    async def environment():
        await trio.lowlevel.checkpoint()
        return {"NUMBER": str(next(count)), "DIRECTORY": str(tmp_path)}

    program, _ = make(
        "import os, pathlib; pathlib.Path(os.environ['DIRECTORY'], os.environ['NUMBER']).touch()", environment
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(program.run)
        await until((tmp_path / "1").exists)
        await program.stop(5)
    assert (tmp_path / "0").exists()
