"""Counts what serving one VM takes."""

from __future__ import annotations

from bisect import bisect_left

from agent.pager.service import LATENCY_BOUNDS, PagerStatistics


class Figures:
    """Mutable; `snapshot` makes what others see."""

    __slots__ = ("fault_bytes", "faults", "latency", "prefetched_bytes")

    def __init__(self) -> None:
        self.faults = 0
        self.fault_bytes = 0
        self.prefetched_bytes = 0
        self.latency = [0] * (len(LATENCY_BOUNDS) + 1)

    def answered(self, seconds: float) -> None:
        """Count a fault that took so long from its event to its answer."""
        self.faults += 1
        self.latency[bisect_left(LATENCY_BOUNDS, seconds)] += 1

    def snapshot(self, *, connected: bool) -> PagerStatistics:
        """As they are now."""
        return PagerStatistics(
            faults=self.faults,
            fault_bytes=self.fault_bytes,
            prefetched_bytes=self.prefetched_bytes,
            latency=tuple(self.latency),
            connected=connected,
        )
