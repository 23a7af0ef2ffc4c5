"""A host out of fakes that outlives its agents, and agents that can be killed between any two steps.

`Host` is what a machine keeps when the agent's process ends: disk, VMs, slots. `host.agent()` is one life of an agent
on it, built from the real manager, records, outbox, slot pool and guest link. Everything that changes the host passes
through `Host.step`, where a test can have the agent killed: nothing of it has an effect afterwards.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import structlog
import trio

from agent.actor.watchdog import LoopWatchdog
from tests.fixtures.threads import without_threads


def _load(name):
    """A module beside this one, which tests know as `sandbox_<name>`."""
    spec = importlib.util.spec_from_file_location(f"sandbox_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


world = _load("world")

HELD = 0.4
"""Well above the daemon's limit: a virtual CPU that was taken away counts as time spent computing."""
SCHEDULED = "/proc/thread-self/schedstat"
"""Nanoseconds on a processor, nanoseconds of waiting for one, and how often (Documentation/scheduler/sched-stats)."""


def pytest_configure(config):
    config.addinivalue_line("markers", "real_threads: files are written in threads, as in the daemon")


SECONDS_PER_TEST = 600


@pytest.fixture(autouse=True)
def _quiet_logs():
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def _bounded():
    """End a test that hangs, whatever it hangs in."""

    def give_up(_signal, _frame):
        raise TimeoutError(f"the test took more than {SECONDS_PER_TEST} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS_PER_TEST)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _watch_loop(request):
    """pytest-trio has no async autouse fixtures; what runs a test is the `run` of its marker, so it is set here."""
    if inspect.iscoroutinefunction(request.node.obj) and request.node.get_closest_marker("real_threads"):
        request.node.add_marker(pytest.mark.trio(run=run_watched), append=False)


class Watchdog(LoopWatchdog):
    """One that takes off the time in which others had the processor, for which the daemon's has but a rough rule."""

    def __init__(self, scheduled):
        super().__init__(self._judge, limit=HELD)
        self.held = []
        self._scheduled = scheduled
        self._waited_before = 0.0

    def before_task_step(self, task):
        self._waited_before = self._waited()
        super().before_task_step(task)

    def _judge(self, task, seconds):
        seconds -= self._waited() - self._waited_before
        if seconds > HELD:
            self.held.append(f"{task} ({seconds * 1000:.0f} ms)")

    def _waited(self):
        return int(os.pread(self._scheduled, 100, 0).split()[1]) / 1e9


def run_watched(main, *, instruments, **options):
    """`trio.run` that fails a test in which a task held the loop."""
    scheduled = os.open(SCHEDULED, os.O_RDONLY)
    watchdog = Watchdog(scheduled)
    gc.freeze()  # a full collection of what earlier tests left behind would be a long step, too
    try:
        result = trio.run(main, instruments=[*instruments, watchdog], **options)
    finally:
        gc.unfreeze()
        os.close(scheduled)
    assert not watchdog.held, f"tasks held the event loop: {', '.join(watchdog.held)}"
    return result


@pytest.fixture
def make_host(tmp_path, monkeypatch, request):
    """A maker of hosts, each in a directory of its own."""
    if request.node.get_closest_marker("real_threads") is None:
        without_threads(monkeypatch)
    numbers = iter(range(10**6))
    return lambda **options: world.Host(tmp_path / f"host{next(numbers)}", monkeypatch, **options)


@pytest.fixture
def host(make_host):
    return make_host()
