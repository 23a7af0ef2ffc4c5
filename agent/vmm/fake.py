"""A driver without VMs: what the agent does around a VM can be tested on any machine, and every failure at will.

It keeps the same promises as the real one (`tests/vmm` runs one suite over both). Its VMs belong to the driver
object, as real ones belong to the host: an agent that is stopped and started again with the same driver finds them.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import trio

from agent.vmm.driver import Vm, VmDriver, VmProcess, VmSpec, VmStartFailed, VmStatistics, VmWillNotDie

FIRST_PID = 2**22 + 1
"""Above the kernel's highest possible pid: a fake identity can never name a real process."""

KILLED = "the VM was ended by the agent"


class FakeMachine:
    """What a VMM process is to the host: it exists, and one day it has ended for a reason."""

    def __init__(self, spec: VmSpec, process: VmProcess) -> None:
        self.spec = spec
        self.process = process
        self.console = ""
        self.unkillable = False
        self.ended = trio.Event()
        self.reason = ""

    def die(self, reason: str) -> None:
        """End, as a VMM does that crashes or whose guest powers off."""
        if not self.ended.is_set():
            self.reason = reason
            self.ended.set()


class FakeVm(Vm):
    """A handle on a machine (see Vm)."""

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine

    @property
    def process(self) -> VmProcess:
        """See Vm."""
        return self._machine.process

    async def wait_exit(self) -> str:
        """See Vm."""
        await self._machine.ended.wait()
        return self._machine.reason

    async def kill(self) -> None:
        """See Vm."""
        with trio.CancelScope(shield=True):  # no waiting inside: a checkpoint only
            await trio.lowlevel.checkpoint()
        _kill(self._machine)

    async def console_tail(self) -> str:
        """See Vm."""
        await trio.lowlevel.checkpoint()
        return self._machine.console

    def statistics(self) -> VmStatistics | None:
        """See Vm."""
        if self._machine.ended.is_set():
            return None
        return VmStatistics(resident_bytes=self._machine.spec.memory_mb << 20, cpu_seconds=0.0)


class FakeVmDriver(VmDriver):
    """See VmDriver. A test steers it: `fail_next_boot`, `boot_gate`, `machine(sandbox_id).die(reason)`."""

    name = "fake"

    def __init__(self) -> None:
        self.machines: dict[VmProcess, FakeMachine] = {}
        self.boot_gate = trio.Event()
        """Clear (a fresh Event) to hold boots half way; set from the start."""
        self.boot_gate.set()
        self._boot_failure: str | None = None
        self._pids = itertools.count(FIRST_PID)

    def fail_next_boot(self, reason: str) -> None:
        """Make the next boot raise VmStartFailed."""
        self._boot_failure = reason

    def machine(self, sandbox_id: str) -> FakeMachine:
        """Return the machine of a sandbox that runs. Raises KeyError."""
        for machine in self._running():
            if machine.spec.sandbox_id == sandbox_id:
                return machine
        raise KeyError(sandbox_id)

    async def boot(self, spec: VmSpec) -> Vm:
        """See VmDriver."""
        await trio.lowlevel.checkpoint()
        machine = FakeMachine(spec, VmProcess(pid := next(self._pids), start_time=pid))
        self.machines[machine.process] = machine
        try:
            await self.boot_gate.wait()
        except trio.Cancelled:
            machine.die(KILLED)
            raise
        if self._boot_failure is not None:
            reason, self._boot_failure = self._boot_failure, None
            machine.die(reason)
            raise VmStartFailed(reason)
        return FakeVm(machine)

    async def adopt(self, spec: VmSpec, process: VmProcess) -> Vm | None:
        """See VmDriver."""
        await trio.lowlevel.checkpoint()
        machine = self.machines.get(process)
        if machine is None or machine.ended.is_set() or machine.spec.sandbox_id != spec.sandbox_id:
            return None
        return FakeVm(machine) if machine.spec.directory == spec.directory else None

    def find_orphans(self, root: Path) -> dict[Path, VmProcess]:
        """See VmDriver."""
        return {
            machine.spec.directory: machine.process
            for machine in self._running()
            if machine.spec.directory.is_relative_to(root)
        }

    async def kill_process(self, process: VmProcess) -> None:
        """See VmDriver."""
        await trio.lowlevel.checkpoint()
        if (machine := self.machines.get(process)) is not None:
            _kill(machine)

    async def remove_leftovers(self) -> None:
        """See VmDriver."""
        await trio.lowlevel.checkpoint()

    def _running(self) -> list[FakeMachine]:
        return [machine for machine in self.machines.values() if not machine.ended.is_set()]


def _kill(machine: FakeMachine) -> None:
    if machine.unkillable and not machine.ended.is_set():
        raise VmWillNotDie(f"fake process {machine.process.pid} is unkillable")
    machine.die(KILLED)
