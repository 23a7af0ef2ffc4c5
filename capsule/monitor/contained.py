"""Tasks beside a follower: what goes wrong in one of them ends that one, and no other."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

import structlog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = structlog.get_logger()

P = ParamSpec("P")


def contained(task: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """Log an exception that nobody expected, a bug, and return. The next round of the follower tries again."""

    @wraps(task)
    async def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await task(*args, **kwargs)
        except Exception:
            log.exception("task_failed", task=task.__qualname__)

    return run
