"""A Trio instrument that reports every task step that holds the loop too long.

A step counts when it took longer than the limit of wall time AND spent that time computing or blocked in a call, not
merely waiting for a CPU that others used: preemption on a busy machine is nobody's bug.
"""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING

import structlog
import trio

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger()

LIMIT = 0.050
"""Seconds a step may take before every other task, heartbeats included, is noticeably late."""


def log_held_loop(task: str, seconds: float) -> None:
    """The report of a daemon: one warning with the task's name."""
    log.warning("loop_held", task=task, milliseconds=round(seconds * 1000))


class LoopWatchdog(trio.abc.Instrument):
    """Calls `report(task name, seconds)` for each step over `limit`; install it by `trio.run`'s `instruments`."""

    def __init__(self, report: Callable[[str, float], None] = log_held_loop, *, limit: float = LIMIT) -> None:
        self._report = report
        self._limit = limit
        self._began = 0.0
        self._cpu = 0.0
        self._waits = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        """Note clock, CPU time and voluntary waits."""
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        self._cpu = usage.ru_utime + usage.ru_stime
        self._waits = usage.ru_nvcsw
        self._began = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Judge the step."""
        took = time.perf_counter() - self._began
        if took <= self._limit:
            return
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        computed = usage.ru_utime + usage.ru_stime - self._cpu > self._limit
        blocked = usage.ru_nvcsw > self._waits
        if computed or blocked:
            self._report(task.name, took)
