"""A driver without VMs: what the agent does around a VM can be tested on any machine, and every failure at will.

It keeps the same promises as the real one (`tests/vmm` runs one suite over both). Its VMs belong to the driver
object, as real ones belong to the host: an agent that is stopped and started again with the same driver finds them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import trio

from agent.vmm.driver import (
    GuestMemory,
    Vm,
    VmCommandFailed,
    VmDriver,
    VmmError,
    VmProcess,
    VmSpec,
    VmStartFailed,
    VmState,
    VmStateFailed,
    VmStatistics,
    VmWillNotDie,
)
from agent.vmm.fake_machine import FakeMachine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Container

FIRST_PID = 2**22 + 1
"""Above the kernel's highest possible pid: a fake identity can never name a real process."""

KILLED = "the VM was ended by the agent"

Call = Literal["boot", "restore", "pause", "resume", "paused", "save_state", "pivot_disk", "disk_file", "memory"]

ERRORS: dict[Call, type[VmmError]] = {"boot": VmStartFailed, "restore": VmStartFailed, "save_state": VmStateFailed}
"""What a call raises when told to fail; VmCommandFailed where nothing else is said."""


@dataclass(slots=True)
class Faults:
    """What a test has arranged for the next calls."""

    planned: dict[Call, list[tuple[VmmError, bool]]] = field(default_factory=lambda: defaultdict(list))
    gates: dict[Call, trio.Event] = field(default_factory=dict)

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        """Hold the call at its gate; raise what was planned before its work, or after it."""
        await trio.lowlevel.checkpoint()
        if (gate := self.gates.get(call)) is not None:
            await gate.wait()
        error, done = self.take(call)
        if error is not None and not done:
            raise error
        yield
        if error is not None:
            raise error

    def take(self, call: Call) -> tuple[VmmError | None, bool]:
        """Return what was planned for the next such call, and whether its work is done all the same."""
        planned = self.planned.get(call)
        return planned.pop(0) if planned else (None, False)


class FakeVm(Vm):
    """A handle on a machine (see Vm). Its calls use no threads: a fake clock does not wait for them."""

    def __init__(self, machine: FakeMachine, faults: Faults) -> None:
        self._machine = machine
        self._faults = faults

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

    async def pause(self) -> None:
        """See Vm."""
        async with self._call("pause"):
            self._machine.paused = True

    async def resume(self) -> None:
        """See Vm."""
        async with self._call("resume"):
            self._machine.paused = self._machine.saved = False

    async def paused(self) -> bool:
        """See Vm."""
        async with self._call("paused"):
            return self._machine.paused

    async def save_state(self, target: Path, *, sync: bool = True) -> None:
        """See Vm."""
        async with self._call("save_state"):
            self._machine.save(target, sync=sync)

    async def pivot_disk(self, overlay: Path) -> None:
        """See Vm."""
        async with self._call("pivot_disk"):
            self._machine.pivot(overlay)

    async def disk_file(self) -> Path:
        """See Vm."""
        async with self._call("disk_file"):
            return self._machine.disk

    def memory(self) -> GuestMemory:
        """See Vm."""
        self._machine.check_alive()
        error, _ = self._faults.take("memory")
        if error is not None:
            raise error
        return self._machine.memory()

    @asynccontextmanager
    async def _call(self, call: Call) -> AsyncIterator[None]:
        self._machine.check_alive()
        async with self._faults.around(call):
            self._machine.check_alive()
            yield


class FakeVmDriver(VmDriver):
    """See VmDriver. A test steers it: `fail_next`, `hold`, `boot_gate`, `machine(sandbox_id)` and its `die`, `tick`."""

    name = "fake"

    def __init__(self) -> None:
        self.machines: dict[VmProcess, FakeMachine] = {}
        self.boot_gate = trio.Event()
        """Clear (a fresh Event) to hold boots half way; set from the start."""
        self.boot_gate.set()
        self._faults = Faults()
        self._pids = itertools.count(FIRST_PID)

    def fail_next(self, call: Call, reason: str, *, error: type[VmmError] | None = None, done: bool = False) -> None:
        """Make the next `call` of any VM raise its typical error, or `error`.

        Told several times, as many calls fail. `done`: only after its work, as when an answer came too late.
        """
        kind = error or ERRORS.get(call, VmCommandFailed)
        self._faults.planned[call].append((kind(reason), done))

    def fail_next_boot(self, reason: str) -> None:
        """Make the next boot raise VmStartFailed."""
        self.fail_next("boot", reason)

    def hold(self, call: Call) -> trio.Event:
        """Hold every `call` half way, until the event is set that is returned."""
        gate = self._faults.gates[call] = trio.Event()
        return gate

    def machine(self, sandbox_id: str) -> FakeMachine:
        """Return the machine of a sandbox that runs. Raises KeyError."""
        for machine in self._running():
            if machine.spec.sandbox_id == sandbox_id:
                return machine
        raise KeyError(sandbox_id)

    def version(self) -> str:
        """See VmDriver."""
        return "fake 1"

    async def boot(self, spec: VmSpec) -> Vm:
        """See VmDriver."""
        await trio.lowlevel.checkpoint()
        return await self._start("boot", self._new_machine(spec))

    async def restore(self, spec: VmSpec, saved: VmState) -> Vm:
        """See VmDriver. Nobody needs to listen at the page socket."""
        await trio.lowlevel.checkpoint()
        return await self._start("restore", self._new_machine(spec, saved))

    async def adopt(self, spec: VmSpec, process: VmProcess) -> Vm | None:
        """See VmDriver."""
        await trio.lowlevel.checkpoint()
        machine = self.machines.get(process)
        if machine is None or machine.ended.is_set() or machine.hidden or machine.spec.sandbox_id != spec.sandbox_id:
            return None
        return FakeVm(machine, self._faults) if machine.spec.directory == spec.directory else None

    def find_orphans(self, root: Path) -> dict[Path, VmProcess]:
        """See VmDriver."""
        return {
            machine.spec.directory: machine.process
            for machine in self._running()
            if machine.spec.directory.is_relative_to(root) and not machine.hidden
        }

    async def kill_process(self, process: VmProcess) -> None:
        """See VmDriver."""
        await trio.lowlevel.checkpoint()
        if (machine := self.machines.get(process)) is not None:
            _kill(machine)

    async def end_users(self, users: Container[int], sandboxes: Container[str]) -> set[int]:
        """See VmDriver."""
        await trio.lowlevel.checkpoint()
        for machine in self._running():
            if machine.spec.uid in users and machine.spec.sandbox_id in sandboxes:
                with suppress(VmWillNotDie):
                    _kill(machine)
        return {machine.spec.uid for machine in self._running() if machine.spec.uid in users}

    async def remove_leftovers(self) -> None:
        """See VmDriver."""
        await trio.lowlevel.checkpoint()

    def _running(self) -> list[FakeMachine]:
        return [machine for machine in self.machines.values() if not machine.ended.is_set()]

    def _new_machine(self, spec: VmSpec, saved: VmState | None = None) -> FakeMachine:
        machine = FakeMachine(spec, VmProcess(pid := next(self._pids), start_time=pid), saved)
        self.machines[machine.process] = machine
        return machine

    async def _start(self, call: Literal["boot", "restore"], machine: FakeMachine) -> Vm:
        try:
            await self.boot_gate.wait()
            async with self._faults.around(call):
                machine.load()
        except trio.Cancelled:
            machine.die(KILLED)
            raise
        except VmStartFailed as error:
            machine.die(str(error))
            raise
        return FakeVm(machine, self._faults)


def _kill(machine: FakeMachine) -> None:
    if machine.unkillable and not machine.ended.is_set():
        raise VmWillNotDie(f"fake process {machine.process.pid} is unkillable")
    machine.die(KILLED)
