"""The drivers of the tests' host: fakes with a step before and after each effect; conftest.py loads this as
`sandbox_drivers`."""

from __future__ import annotations

import os
import shutil

import msgspec
import trio

from agent.guest.fake import FakeGuest
from agent.net.addresses import slot_addresses
from agent.net.fake import FakeSlotBackend
from agent.pager.fake import FakePager
from agent.snapshots import files as snapshot_files
from agent.snapshots.dirty import ContentDirty
from agent.snapshots.memory_file import data_within
from agent.storage.fake import FakeContent, FakeOverlays
from agent.vmm.fake import FakeVmDriver
from agent.wire.faults import Fault, FaultCode

UID_BASE = 2_000_000


class Crash(BaseException):
    """The agent was killed; its process ends without another effect."""


STORE_STEPS = ("link", "rename")
"""The store's own tests stop it at every operation."""

STORE_OPERATIONS = {
    name: getattr(snapshot_files, name)
    for name in (
        *STORE_STEPS,
        "provide_directory",
        "make_directory",
        "create",
        "write",
        "sync",
        "sync_directory",
        "set_owner",
        "set_mode",
        "unlink",
        "remove_directory",
    )
}


class GuestOfHost(FakeGuest):
    """A guest whose processes stand still, or do not, whatever becomes of the link to it."""

    def __init__(self, host, address, **options):
        super().__init__(address, **options)
        self._host = host
        self._name = next((m.spec.sandbox_id for m in host.vms.machines.values() if _is_at(m, address)), "")
        if self._name in host.frozen_guests:
            self.frozen = True

    async def answer(self, method, body, stream):
        if self._host.dead:
            raise Fault(FaultCode.UNAVAILABLE, "nobody asks any more")
        if method in {"settle", "thaw", "configure"}:
            try:
                self._host.step(f"guest_{method}")
            except Crash:  # the agent's, not the guest's
                self._host.life.kill()
                self.hang_up()
                await trio.sleep_forever()
        reply = await super().answer(method, body, stream)
        if self.frozen:
            self._host.frozen_guests.add(self._name)
        else:
            self._host.frozen_guests.discard(self._name)
        return reply


class TrackedDirty(ContentDirty):
    """As the kernel does it: after a reset only what was written since, whatever became of the parent meanwhile."""

    def __init__(self, host, memory, descent):
        super().__init__(memory, descent)
        self._host = host
        self._whole = memory

    def ranges(self):
        before = self._host.resets.get(self._whole.pid)
        if before is None:
            return super().ranges()
        pages = self._pages()
        changed = sorted(offset for offset in pages.keys() | before.keys() if pages.get(offset) != before.get(offset))
        return [(offset, 4096) for offset in changed]

    def reset(self):
        self._host.step("tracking_reset")
        self._host.resets[self._whole.pid] = self._pages()

    def _pages(self):
        found = {}
        for begin, length in data_within(self._whole.fd, [(0, self._whole.size)]):
            for offset in range(begin, begin + length, 4096):
                found[offset] = os.pread(self._whole.fd, 4096, offset)
        return found


def _is_at(machine, address):
    return not machine.ended.is_set() and slot_addresses(machine.spec.uid - UID_BASE).host_ip == address


class Pager(FakePager):
    """A pager with steps; its VMs live as long as their VMM."""

    def __init__(self, host):
        super().__init__()
        self._host = host
        self.fail_on_wait = None

    async def listen(self, vm):
        self._host.step("pager_listen")
        await super().listen(vm)

    async def wait_connected(self, vm_id, *, timeout):  # noqa: ASYNC109 - see Pager
        if self.fail_on_wait is not None:
            error, self.fail_on_wait = self.fail_on_wait, None
            raise error
        await super().wait_connected(vm_id, timeout=timeout)

    async def release(self, vm_id):
        self._host.step("pager_release")
        return await super().release(vm_id)

    def forget_dead(self):
        """Do what the real one does when a VMM ends."""
        for vm_id in self.vms.keys() - self._host.running():
            if self.vms[vm_id].failure is None:
                del self.vms[vm_id]


class Vms(FakeVmDriver):
    """VMs of a host; an agent's cancellation has no effect on them once it is dead."""

    def __init__(self, host):
        super().__init__()
        self._host = host

    async def boot(self, spec):
        self._host.step("boot")
        vm = await self._start_vm(super().boot(spec))
        self._host.step("booted")
        return vm

    async def restore(self, spec, saved):
        self._host.step("restore")
        vm = await self._start_vm(super().restore(spec, saved))
        self._host.frozen_guests.add(spec.sandbox_id)
        self._host.step("restored")
        return vm

    async def _start_vm(self, work):
        before = set(self.machines)
        try:
            return VmOfHost(self._host, await work)
        except trio.Cancelled:
            if self._host.dead:
                for process in self.machines.keys() - before:
                    self.machines[process].ended = trio.Event()
            raise

    async def adopt(self, spec, process):
        self._host.step("adopt")
        vm = await super().adopt(spec, process)
        return vm and VmOfHost(self._host, vm)

    async def kill_process(self, process):
        self._host.step("kill_process")
        await super().kill_process(process)
        self._host.step("killed_process")

    async def end_users(self, users, sandboxes):
        self._host.step("end_users")
        return await super().end_users(users, sandboxes)

    async def remove_leftovers(self):
        self._host.step("remove_leftovers")


class VmOfHost:
    """A Vm with steps."""

    def __init__(self, host, vm):
        self._host = host
        self._vm = vm
        self.process = vm.process
        self.wait_exit = vm.wait_exit
        self.console_tail = vm.console_tail
        self.statistics = vm.statistics
        self.memory = vm.memory
        self.paused = vm.paused
        self.disk_file = vm.disk_file

    async def pause(self):
        self._host.step("pause")
        await self._vm.pause()
        self._host.step("paused")

    async def resume(self):
        self._host.step("resume")
        await self._vm.resume()
        self._host.step("resumed")

    async def save_state(self, target, *, sync=True):
        self._host.step("save_state")
        await self._vm.save_state(target, sync=sync)
        self._host.step("saved_state")

    async def pivot_disk(self, overlay):
        self._host.step("pivot")
        await self._vm.pivot_disk(overlay)
        self._host.step("pivoted")

    async def kill(self):
        self._host.step("kill")
        await self._vm.kill()
        self._host.step("killed")


class Slots(FakeSlotBackend):
    """A slot backend with steps."""

    def __init__(self, host):
        super().__init__()
        self._host = host

    async def create(self, number):
        self._host.step("slot_create")
        await super().create(number)
        self._host.step("slot_created")

    async def remove(self, number):
        self._host.step("slot_remove")
        await super().remove(number)
        self._host.step("slot_removed")

    async def open_tap(self, number):
        self._host.step("open_tap")
        return await super().open_tap(number)


class Overlays(FakeOverlays):
    """Overlays with steps; `remove_errors` are raised and used up one per call."""

    def __init__(self, host):
        super().__init__()
        self._host = host
        self.remove_errors = []

    async def create(self, base, overlay, size_mb, *, layers=()):
        self._host.step("overlay_create")
        await super().create(base, overlay, size_mb, layers=layers)
        self._host.step("overlay_created")

    def blocks(self, overlay):
        return msgspec.json.decode(overlay.read_bytes(), type=FakeContent).blocks

    async def freeze(self, overlay, size_mb):
        self._host.step("overlay_freeze")
        await super().freeze(overlay, size_mb)

    async def merge(self, base, layers, target):
        self._host.step("overlay_merge")
        await super().merge(base, layers, target)
        self._host.step("overlay_merged")

    async def remove(self, overlay):
        self._host.step("overlay_remove")
        if self.remove_errors:
            raise self.remove_errors.pop(0)
        await super().remove(overlay)
        self._host.step("overlay_removed")


class StepwiseOs:
    """`os` for records.py: an fsync is a step, so a crash is possible before and after each rename."""

    def __init__(self, host):
        self._host = host

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, _descriptor):
        self._host.step("fsync")


class StepwiseShutil:
    """`shutil` for records.py: removing a tree can stop half-way."""

    def __init__(self, host):
        self._host = host

    def rmtree(self, path):
        self._host.step("rmtree")
        for file in (one for one in path.iterdir() if not one.is_dir() or one.is_symlink()):
            file.unlink()
            self._host.step("unlinked")
        shutil.rmtree(path)
        self._host.step("rmtree_done")
