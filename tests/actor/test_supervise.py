"""Supervision: waits, the window, giving up; an hour takes milliseconds under the fake clock."""

from __future__ import annotations

import pytest
import structlog
import trio

from agent.actor.supervise import RestartPolicy, TooManyFailures, supervise


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as captured:
        yield captured


class Failing:
    """Fails after `lasts` seconds, `times` times, then returns."""

    def __init__(self, times: int, *, lasts: float = 0.0) -> None:
        self.times, self.lasts = times, lasts
        self.started: list[float] = []

    async def run(self) -> None:
        self.started.append(trio.current_time())
        await trio.sleep(self.lasts)
        if len(self.started) <= self.times:
            raise ValueError(len(self.started))


def waits(task: Failing) -> list[float]:
    return [round(b - a - task.lasts, 6) for a, b in zip(task.started, task.started[1:], strict=False)]


async def test_delays_grow_to_the_maximum(autojump_clock):
    """0.5, 1, 2 … 30 s; then it returns when the task does."""
    task = Failing(9)
    await supervise("t", task.run, RestartPolicy(within=600))
    assert waits(task) == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


async def test_failures_outside_the_window_are_forgotten(autojump_clock):
    """A task that fails once a window waits the first delay each time and may go on for ever."""
    task = Failing(50, lasts=61.0)
    await supervise("t", task.run, RestartPolicy(restarts=1, within=60))
    assert waits(task) == [0.5] * 50


async def test_too_many_failures(autojump_clock, logs):
    """`restarts` are allowed in the window; the next failure takes the parent down, with its cause."""
    task = Failing(99)
    seen = []
    with pytest.raises(TooManyFailures, match="t failed 4 times in 60 s") as caught:
        await supervise("t", task.run, RestartPolicy(restarts=3), on_failure=seen.append)
    assert len(task.started) == 4
    assert isinstance(caught.value.__cause__, ValueError)
    assert [str(error) for error in seen] == ["1", "2", "3", "4"]
    assert {(entry["event"], entry["task"]) for entry in logs} == {("task_failed", "t")}
    assert [entry["restart_in"] for entry in logs] == [0.5, 1.0, 2.0]


async def test_no_restarts_at_all(autojump_clock):
    """A policy of zero gives up on the first failure."""
    with pytest.raises(TooManyFailures):
        await supervise("t", Failing(1).run, RestartPolicy(restarts=0))


@pytest.mark.parametrize("where", ["running", "waiting"])
async def test_cancellation_passes_through(autojump_clock, where):
    """It is neither a failure nor delayed, in the task and between two runs of it."""
    task = Failing(1, lasts=10.0 if where == "running" else 0.0)
    with trio.move_on_after(0.25) as scope:
        await supervise("t", task.run, RestartPolicy())
    assert scope.cancelled_caught
    assert len(task.started) == 1
    assert trio.current_time() - task.started[0] == pytest.approx(0.25)


async def test_a_group_of_failures_is_a_failure(autojump_clock):
    """Tasks with nurseries raise groups."""
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            async with trio.open_nursery():
                raise ValueError

    await supervise("t", run, RestartPolicy())
    assert runs == 2


def test_delay_of_very_many_failures():
    """No overflow."""
    assert RestartPolicy().delay(10_000) == 30.0
