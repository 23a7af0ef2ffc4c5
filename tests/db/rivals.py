"""The same thing done by several at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


async def together(count: int, work: Callable[[int], Awaitable[object]]) -> list[object]:
    """Results of `work(0)`, `work(1)`, … run at the same time."""
    results: list[object] = []

    async def one(n: int) -> None:
        results.append(await work(n))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for n in range(count):
                nursery.start_soon(one, n)
    return results
