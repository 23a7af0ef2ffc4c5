"""Supervision as data: how often a task may fail and how long to wait before it is started again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """At most `restarts` within `within` seconds (None: no bound); waits grow from `first_delay` by `factor`."""

    restarts: int | None = None
    within: float = 60.0
    first_delay: float = 0.5
    factor: float = 2.0
    max_delay: float = 30.0

    def delay(self, recent_failures: int) -> float:
        """Seconds to wait after the n-th failure in the window (n ≥ 1)."""
        return min(self.max_delay, self.first_delay * self.factor ** min(recent_failures - 1, 32))


class TooManyFailures(Exception):  # noqa: N818 - reads as what happened
    """The task failed more often than its policy allows; the last failure is its cause."""


async def supervise(
    name: str,
    run: Callable[[], Awaitable[None]],
    policy: RestartPolicy,
    *,
    on_failure: Callable[[Exception], None] = lambda _: None,
) -> None:
    """Run `run` until it returns; when it raises, log, wait, run it again, as `policy` says.

    Cancellation passes through. Raises TooManyFailures, which takes the parent nursery (and so the daemon) down:
    a half-alive daemon is worse than a restarted one.
    """
    failures: deque[float] = deque()
    while True:
        try:
            return await run()
        except Exception as err:
            now = trio.current_time()
            failures.append(now)
            while failures[0] < now - policy.within:
                failures.popleft()
            on_failure(err)
            if policy.restarts is not None and len(failures) > policy.restarts:
                raise TooManyFailures(f"{name} failed {len(failures)} times in {policy.within:g} s") from err
            delay = policy.delay(len(failures))
            log.exception("task_failed", task=name, failures=len(failures), restart_in=delay)
        await trio.sleep(delay)
