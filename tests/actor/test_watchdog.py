"""The loop watchdog reports steps that hold the loop, with the task's name, and nothing else."""

from __future__ import annotations

import gc
import time

import pytest
import structlog
import trio

from agent.actor.watchdog import LIMIT, LoopWatchdog, log_held_loop

pytestmark = pytest.mark.may_hold_loop


async def sleep_blocking() -> None:
    await trio.lowlevel.checkpoint()
    time.sleep(0.1)  # noqa: ASYNC251 - what must not be done


async def compute() -> None:
    await trio.lowlevel.checkpoint()
    end = time.thread_time() + 0.1
    while time.thread_time() < end:
        pass


async def idle() -> None:
    for _ in range(3):
        await trio.sleep(0.06)


def held_by(*tasks) -> list[tuple[str, float]]:
    reports: list[tuple[str, float]] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task, name=task.__name__)

    gc.disable()  # a collection of what earlier tests left behind holds the loop, too
    try:
        trio.run(main, instruments=[LoopWatchdog(lambda name, seconds: reports.append((name, seconds)))])
    finally:
        gc.enable()
    return reports


@pytest.mark.parametrize("task", [sleep_blocking, compute])
def test_a_step_that_holds_the_loop_is_reported(task):
    """100 ms of sleeping or computing, once, with the name and the time; the innocent task beside it is not named."""
    [(name, seconds)] = held_by(task, idle)
    assert name == task.__name__
    assert seconds > 0.09


def test_an_idle_loop_is_not_reported():
    """Waiting in Trio is what tasks are for."""
    assert held_by(idle, idle) == []


def test_a_step_that_only_waited_for_a_cpu_is_not_reported(monkeypatch):
    """Preempted: wall time passed, but neither CPU time nor a blocking call; simulated, for nobody can order it."""
    clock = iter([10.0, 10.0 + 3 * LIMIT])
    monkeypatch.setattr("agent.actor.watchdog.time.perf_counter", lambda: next(clock))
    reports = []
    watchdog = LoopWatchdog(lambda *report: reports.append(report))

    class Usage:
        ru_utime, ru_stime, ru_nvcsw = 1.0, 1.0, 7

    monkeypatch.setattr("agent.actor.watchdog.resource.getrusage", lambda _: Usage)
    watchdog.before_task_step(None)
    watchdog.after_task_step(None)
    assert reports == []


def test_the_report_of_a_daemon():
    """One warning with the name and whole milliseconds."""
    with structlog.testing.capture_logs() as logs:
        log_held_loop("agent.x.run", 0.1234)
    assert logs == [{"event": "loop_held", "log_level": "warning", "task": "agent.x.run", "milliseconds": 123}]
