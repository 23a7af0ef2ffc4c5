"""The same thing done by several at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable


async def together(count: int, work: Callable[[int], Awaitable[object]]) -> list[object]:
    """Results of `work(0)`, `work(1)`, … run at the same time."""
    results: list[object] = []
