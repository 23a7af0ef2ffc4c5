"""What stands behind a fake VM: the process, its memory (real, so that it can be captured), its guest (a counter)."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import TYPE_CHECKING

import msgspec
import trio

from agent.vmm.driver import GuestMemory, VmCommandFailed, VmGone, VmStartFailed, VmStateFailed
from agent.vmm.state_file import write_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent.vmm.driver import VmProcess, VmSpec, VmState

MEMORY_ADDRESS = 0x7F00_0000_0000
"""Where the memory seems to be mapped. There is no such process: dirty pages can be found by content only."""

PAGE = mmap.PAGESIZE


class SavedState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state file of a fake VM, as JSON."""

    counter: int
    vcpus: int
    memory_mb: int


class FakeMachine:
    """What a VMM process is to the host: it exists, and one day it has ended for a reason.

    Its guest does nothing but count, when told to (`tick`), and notes the count in the first page of its memory.
    """

    def __init__(self, spec: VmSpec, process: VmProcess, restored_from: VmState | None = None) -> None:
        self.spec = spec
        self.process = process
        self.restored_from = restored_from
        self.console = ""
        self.unkillable = False
        self.hidden = False
        """Whether its guest has taken it over, and it does not look like a VMM in the process table any more."""
        self.ended = trio.Event()
        self.reason = ""
        self.counter = 0
        self.paused = restored_from is not None
        self.saved = False
        self.disk = spec.disk
        self.frozen: list[Path] = []
        """Disks that were pivoted away from, oldest first."""
        self._memory: int | None = None
        self._close_memory: Callable[[], object] = lambda: None

    def die(self, reason: str) -> None:
        """End, as a VMM does that crashes or whose guest powers off."""
        if not self.ended.is_set():
            self.reason = reason
            self.ended.set()
            self._close_memory()
            self._memory = None

    def tick(self) -> int:
        """Let the guest count one further, if its vCPUs run; return the count."""
        self.check_alive()
        if not self.paused:
            self.counter += 1
            self.write(0, self.counter.to_bytes(8, "little"))
        return self.counter

    def read(self, offset: int, length: int) -> bytes:
        """Read guest memory; what nobody wrote is zero, in a restored machine too: no pager brings anything."""
        return os.pread(self._descriptor(), length, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Write guest memory, as the guest would."""
        os.pwrite(self._descriptor(), data, offset)

    def memory(self) -> GuestMemory:
        """See Vm."""
        descriptor = os.open(f"/proc/self/fd/{self._descriptor()}", os.O_RDONLY | os.O_CLOEXEC)
        return GuestMemory(self.process.pid, MEMORY_ADDRESS, self.spec.memory_mb << 20, descriptor)

    def save(self, target: Path, *, sync: bool) -> None:
        """See Vm.save_state. Blocks."""
        if not self.paused or self.saved:
            raise VmStateFailed("the VM must be paused, and resumed after it was saved")
        self.saved = True
        state = SavedState(self.counter, self.spec.vcpus, self.spec.memory_mb)
        write_state(target, msgspec.json.encode(state), sync=sync)

    def load(self) -> None:
        """Continue where another machine was saved, if this one is to. Blocks. Raises VmStartFailed."""
        if self.restored_from is None:
            return
        path = self.restored_from.state
        try:
            state = msgspec.json.decode(path.read_bytes(), type=SavedState)
        except (OSError, msgspec.DecodeError) as error:
            raise VmStartFailed(f"load of migration failed: {path}: {error}") from error
        if (state.vcpus, state.memory_mb) != (self.spec.vcpus, self.spec.memory_mb):
            raise VmStartFailed(f"load of migration failed: {path}: saved from a machine of another shape")
        self.counter = state.counter

    def pivot(self, overlay: Path) -> None:
        """See Vm.pivot_disk."""
        if self.saved:
            raise VmCommandFailed("a disk cannot be pivoted between save and resume")
        if not overlay.is_file():
            raise VmCommandFailed(f"{overlay} does not exist")
        self.frozen.append(self.disk)
        self.disk = overlay

    def check_alive(self) -> None:
        """Raise VmGone if the machine has ended."""
        if self.ended.is_set():
            raise VmGone(self.reason)

    def _descriptor(self) -> int:
        """The memory, made when first asked for: most fake machines never need theirs."""
        self.check_alive()
        if self._memory is None:
            self._memory = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC)
            os.ftruncate(self._memory, self.spec.memory_mb << 20)
            self._close_memory = weakref.finalize(self, os.close, self._memory)
        return self._memory
