"""Whether this host has room for one more VM: memory is promised, never overcommitted; some disk is left alone."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from agent.wire.calls import VMM_MEMORY_MB
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from agent.sandboxes.sandbox import Sandbox

DISK_RESERVE_MB = 2048
"""Disk that new sandboxes leave alone: overlays grow, and the host needs some for itself."""


class Admission:
    """The host's memory and who has how much of it. Checks without waiting: what is then entered is counted at once."""

    def __init__(self, memory_mb: int, sandboxes: Mapping[str, Sandbox]) -> None:
        self.memory_mb = memory_mb
        self.draining = False
        self._sandboxes = sandboxes
        self._spare_mb = 0
        self._give_up_spare: Callable[[], None] = lambda: None

    def taken_mb(self) -> int:
        """What VMs of sandboxes have, or will have; paused ones have nothing."""
        held = (sandbox.memory_mb() for sandbox in self._sandboxes.values())
        return sum(memory + VMM_MEMORY_MB for memory in held if memory)

    def check_create(self, memory_mb: int) -> None:
        """Fault `draining` or `no_capacity`."""
        if self.draining:
            raise Fault(FaultCode.DRAINING, "this host takes no new sandboxes", retryable=True)
        self._check(memory_mb)

    def check_resume(self, memory_mb: int) -> None:
        """Likewise."""
        if self.draining:
            raise Fault(FaultCode.DRAINING, "this host resumes no sandboxes now", retryable=True)
        self._check(memory_mb)

    def lend(self, memory_mb: int, give_up: Callable[[], None]) -> bool:
        """Memory that nobody needs now, for work that nobody waits for; `give_up` is called when somebody does."""
        if self.draining or self.taken_mb() + memory_mb + VMM_MEMORY_MB > self.memory_mb:
            return False
        self._spare_mb, self._give_up_spare = memory_mb + VMM_MEMORY_MB, give_up
        return True

    def take_back(self) -> None:
        """The work has ended."""
        self._spare_mb, self._give_up_spare = 0, lambda: None

    def _check(self, memory_mb: int) -> None:
        taken = self.taken_mb()
        wanted = memory_mb + VMM_MEMORY_MB
        if taken + wanted > self.memory_mb:
            raise Fault(
                FaultCode.NO_CAPACITY,
                f"{memory_mb} MiB do not fit: {taken} of {self.memory_mb} MiB are taken on this host",
                retryable=True,
            )
        if taken + wanted + self._spare_mb > self.memory_mb:
            self._give_up_spare()


def check_disk(root: Path) -> None:
    """Fault `no_capacity` when the disk is nearly full. Blocks."""
    free_mb = free_disk_mb(root)
    if free_mb < DISK_RESERVE_MB:
        raise Fault(FaultCode.NO_CAPACITY, f"this host has only {free_mb} MiB of disk left", retryable=True)


def free_disk_mb(root: Path) -> int:
    """What is left. Blocks."""
    return shutil.disk_usage(root).free // 2**20
