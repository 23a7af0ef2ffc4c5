"""A pager without processes: remembers what it was asked, and fails as a test wants it to.

Passes the same conformance suite as the real one (tests/pager). Its VMs belong to the object, as the real one's belong
to its process: an agent that is stopped and started again with the same fake finds them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from agent.pager.service import (
    LATENCY_BOUNDS,
    ConnectTimeout,
    NotPaged,
    PagedVm,
    Pager,
    PagerError,
    PagerStatistics,
    PagingDamaged,
    PagingFailed,
)


@dataclass
class FakePagedVm:
    """One VM as the fake sees it."""

    vm: PagedVm
    connected: trio.Event = field(default_factory=trio.Event)
    failure: str | None = None
    damaged: bool = False
    faults: int = 0
    recorded: bool = False


class FakePager(Pager):
    """See Pager. A test steers it:

    - `fail_next(error)`: the next call of any method raises it;
    - `hold_connections = True`: from then on VMMs do not connect by themselves, `connect(vm_id)` does it;
    - `fail_vm(vm_id, reason)`: what a damaged file does, or another trouble (`damaged=False`); ending the VM is the
      test's, there is no process;
    - `vms`: what it listens for and serves, `recorded`: the ids whose working set was written, in order.
    """

    def __init__(self) -> None:
        self.vms: dict[str, FakePagedVm] = {}
        self.recorded: list[str] = []
        self.hold_connections = False
        self._failure: PagerError | None = None

    def fail_next(self, error: PagerError) -> None:
        """Make the next call raise this."""
        self._failure = error

    def connect(self, vm_id: str) -> None:
        """Do what a VMM does that starts."""
        self.vms[vm_id].connected.set()

    def touch(self, vm_id: str, faults: int) -> None:
        """Do what a guest does that touches memory that is not there yet."""
        self.vms[vm_id].faults += faults

    def fail_vm(self, vm_id: str, reason: str, *, damaged: bool = True) -> None:
        """Do what the real one does about a fault that it cannot serve."""
        entry = self.vms[vm_id]
        if entry.failure is None:
            entry.failure, entry.damaged = reason, damaged
        entry.connected.set()

    async def listen(self, vm: PagedVm) -> None:
        """See Pager."""
        await self._begin()
        entry = self.vms.get(vm.vm_id)
        if entry is not None:
            _discard(entry)
        self.vms[vm.vm_id] = entry = FakePagedVm(vm)
        if not self.hold_connections:
            entry.connected.set()

    async def wait_connected(self, vm_id: str, *, timeout: float) -> None:  # noqa: ASYNC109 - see Pager
        """See Pager."""
        await self._begin()
        entry = self._entry(vm_id)
        with trio.move_on_after(timeout):
            await entry.connected.wait()
        if self.vms.get(vm_id) is not entry:
            raise NotPaged(f"the pager has no VM {vm_id}")
        if entry.failure is not None:
            raise (PagingDamaged if entry.damaged else PagingFailed)(entry.failure)
        if not entry.connected.is_set():
            raise ConnectTimeout(f"the VMM of {vm_id} has not connected in {timeout:g} s")

    async def record_working_set(self, vm_id: str) -> None:
        """See Pager."""
        await self._begin()
        entry = self._entry(vm_id)
        if not entry.recorded:
            entry.recorded = True
            self.recorded.append(vm_id)

    async def release(self, vm_id: str) -> PagerStatistics | None:
        """See Pager."""
        await self._begin()
        entry = self.vms.pop(vm_id, None)
        if entry is None:
            return None
        figures = _figures(entry)
        _discard(entry)
        return figures

    async def failure(self, vm_id: str) -> str | None:
        """See Pager."""
        await self._begin()
        entry = self.vms.get(vm_id)
        return None if entry is None else entry.failure

    async def damage(self, vm_id: str) -> str | None:
        """See Pager."""
        await self._begin()
        entry = self.vms.get(vm_id)
        return entry.failure if entry is not None and entry.damaged else None

    async def statistics(self) -> dict[str, PagerStatistics]:
        """See Pager."""
        await self._begin()
        return {vm_id: _figures(entry) for vm_id, entry in self.vms.items()}

    async def _begin(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise error

    def _entry(self, vm_id: str) -> FakePagedVm:
        entry = self.vms.get(vm_id)
        if entry is None:
            raise NotPaged(f"the pager has no VM {vm_id}")
        return entry


def _discard(entry: FakePagedVm) -> None:
    """Who waits for a VM that is released learns it."""
    entry.failure = entry.failure or "the pager was told to release the VM"
    entry.connected.set()


def _figures(entry: FakePagedVm) -> PagerStatistics:
    connected = entry.connected.is_set() and entry.failure is None
    latency = (entry.faults, *(0 for _ in LATENCY_BOUNDS))
    return PagerStatistics(faults=entry.faults, fault_bytes=entry.faults << 16, latency=latency, connected=connected)
