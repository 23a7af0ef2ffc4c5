"""Background tasks inside a context manager that its user must not notice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery that ends with the body, and gives the body's own exception on as it was raised, in no group.

    A failure of a task of ours, which ends the body, comes in its place."""
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as exc:
                raised = exc
                raise
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        failure = _chosen(raised, group)
    else:
        return
    raise failure


def _chosen(raised: BaseException | None, group: BaseExceptionGroup[BaseException]) -> BaseException:
    if raised is not None and not isinstance(raised, trio.Cancelled):
        return raised
    ours = group.subgroup(lambda exc: not isinstance(exc, trio.Cancelled))
    return _first(ours or group)


def _first(exc: BaseException) -> BaseException:
    return _first(exc.exceptions[0]) if isinstance(exc, BaseExceptionGroup) else exc
