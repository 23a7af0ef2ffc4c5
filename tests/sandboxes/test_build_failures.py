"""Every way in which making a sandbox fails: a fault that says what to do, no host's path in it, and nothing left."""

from __future__ import annotations

import errno
import threading

import pytest
import trio
from sandbox_world import create_body, request, sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.net import errors as net
from agent.sandboxes import admission
from agent.sandboxes.resuming import SLOT_TIMEOUT
from agent.storage import overlay as storage
from agent.vmm import driver as vmm
from agent.wire.faults import Fault, FaultCode

ONE, TWO = sandbox_id(1), sandbox_id(2)
SECRET = "/var/lib/capsule/agent/secret.qcow2"

NETWORK = [kind(SECRET) for kind in net.NetworkError.__subclasses__() if kind is not net.SlotTimeoutError]
NETWORK.append(net.SlotTimeoutError(SECRET, threading.current_thread()))
STORAGE = [kind(SECRET) for kind in storage.StorageError.__subclasses__()]
VMM = [kind(SECRET) for kind in vmm.VmmError.__subclasses__()]
FILES = [OSError(errno.EIO, "bad", SECRET), OSError(errno.ENOSPC, "full", SECRET)]
BUGS = [ValueError(SECRET), ExceptionGroup(SECRET, [KeyError(SECRET)])]
FAILURES = [
    *(("open_tap", error) for error in NETWORK),
    *(("overlay_create", error) for error in STORAGE),
    *(("boot", error) for error in VMM),
    *((step, error) for error in FILES + BUGS for step in ("fsync", "open_tap", "overlay_create", "boot", "booted")),
]
NO_CAPACITY = (net.NoFreeSlots, storage.HostDiskFull)


def _name(value):
    return value if isinstance(value, str) else f"{type(value).__name__}{getattr(value, 'errno', '')}"


@pytest.mark.parametrize(("step", "error"), FAILURES, ids=_name)
async def test_a_failing_step(host, autojump_clock, step, error):
    """Each typed error of each layer: the right code, retryable, nothing left, and the next try works."""
    async with host.agent() as agent:
        await wait_all_tasks_blocked()

        def on_step(name):
            if name == step:
                host.on_step = lambda name: None
                raise error

        host.on_step = on_step
        with pytest.raises(Fault) as caught:
            await agent.create(ONE)
        fault = caught.value
        full = isinstance(error, NO_CAPACITY) or getattr(error, "errno", None) == errno.ENOSPC
        assert fault.code == (FaultCode.NO_CAPACITY if full else FaultCode.INTERNAL)
        assert fault.retryable
        assert "/" not in fault.message
        await agent.check()
        assert host.running() == set()
        await agent.create(ONE)
        await agent.check()


async def test_no_free_slot(host, autojump_clock):
    """A host whose slots are all in use says so at once, and takes the next one when one is free again."""
    host.slot_count = 1
    async with host.agent() as agent:
        await agent.create(ONE)
        with pytest.raises(Fault, match="no free network slot") as caught:
            await agent.create(TWO)
        assert caught.value.code == FaultCode.NO_CAPACITY
        await agent.destroy(ONE)
        await agent.create(TWO)
        await agent.check()


async def test_slots_that_cannot_be_made(host, autojump_clock):
    """A host that cannot make slots says so after a bound, and its boots are not held up for ever."""
    host.slots_ahead = 0
    host.slots.create_errors = [net.SlotCreateError("no")] * 1000
    async with host.agent() as agent:
        began = trio.current_time()
        with pytest.raises(Fault, match="slot in time") as caught:
            await agent.create(ONE)
        assert caught.value.code == FaultCode.NO_CAPACITY
        assert trio.current_time() - began == pytest.approx(SLOT_TIMEOUT)
        assert agent.parts.boots.borrowed_tokens == 0
        assert host.directories() == set()


async def test_a_silent_guest(host, autojump_clock):
    """No guest daemon within the time-out: unavailable, retryable, and the boots behind it go on."""
    host.guest_options = {"boots": False}
    async with host.agent(guest_timeout=7.0, boots=trio.CapacityLimiter(1)) as agent:
        began = trio.current_time()
        with pytest.raises(Fault, match="did not come up in 7 s") as caught:
            await agent.create(ONE)
        assert caught.value.code == FaultCode.UNAVAILABLE
        assert trio.current_time() - began == pytest.approx(7)
        host.guest_options = {}
        await agent.create(TWO)
        await agent.check()


async def test_a_vm_that_dies_while_it_starts(host, autojump_clock):
    """It is noticed at once, not at the guest's time-out, and the outbox has nothing: the creator is told."""
    host.guest_options = {"boots": False}
    async with host.agent() as agent:
        sandbox = await agent.manager.create(request(ONE))
        with trio.move_on_after(3):
            await sandbox.started.wait()
        began = trio.current_time()
        host.vms.machine(ONE).die(f"QEMU exited: {SECRET}")
        with pytest.raises(Fault, match="VM ended while it started") as caught:
            await sandbox.started.wait()
        assert caught.value.retryable
        assert trio.current_time() == began
        assert agent.told() == []
        await agent.check()


@pytest.mark.parametrize("fault", [Fault("no_capacity", "I am a host"), Fault("x", "y"), None])
async def test_a_guest_that_does_not_take_its_configuration(host, autojump_clock, fault):
    """Its own words and codes go to the log; a guest that does not answer is given up after a bound."""

    async def answer(method, body, stream):
        if fault is None:
            await trio.sleep_forever()
        raise fault

    host.guest_options = {"answer": answer}
    async with host.agent() as agent:
        with pytest.raises(Fault, match="did not take its configuration") as caught:
            await agent.create(ONE)
        assert caught.value.code == FaultCode.UNAVAILABLE
        await agent.check()


async def test_a_boot_that_leaves_its_process(host, autojump_clock):
    """A failed boot whose VMM hangs in the kernel: its disk and slot stay until it has gone."""
    async with host.agent() as agent:
        await wait_all_tasks_blocked()

        def on_step(name):
            if name == "booted":
                host.on_step = lambda name: None
                host.vms.machine(ONE).unkillable = True
                raise vmm.VmWillNotDie("hangs")

        host.on_step = on_step
        sandbox = await agent.manager.create(request(ONE))
        with trio.move_on_after(5):
            await sandbox.started.wait()
        assert agent.statuses() == {ONE: "stopping"}
        assert (host.state.directory(ONE) / "disk.qcow2").exists()
        assert agent.slots.statistics().in_use == 1
        host.vms.machine(ONE).unkillable = False
        with pytest.raises(Fault):
            await sandbox.started.wait()
        await agent.check()
        assert host.running() == set()


async def test_the_asker_hangs_up(host, autojump_clock):
    """A client that goes away changes nothing once the command was admitted: cancelled, or its connection lost."""
    host.guest_options = {"boots": False}
    async with host.agent() as agent:
        for name, cancelled in ((ONE, True), (TWO, False)):
            async with agent.connection() as control_plane, trio.open_nursery() as nursery:

                async def ask(name=name, control_plane=control_plane):
                    await control_plane.call("sandbox.create", create_body(name), timeout=60)

                nursery.start_soon(ask)
                await wait_all_tasks_blocked()
                if cancelled:
                    nursery.cancel_scope.cancel()
                else:
                    control_plane.close()
                    nursery.cancel_scope.cancel()
        for guest in host.guests.values():
            guest.boots = True
        await trio.sleep(10)
        assert agent.statuses() == {ONE: "running", TWO: "running"}
        await agent.check()


async def test_the_askers_deadline_passes(host, autojump_clock):
    """The build goes on, and the next create with the same id gets its sandbox."""
    host.guest_options = {"boots": False}
    async with host.agent() as agent, agent.connection() as control_plane:
        with pytest.raises(Fault) as caught:
            await control_plane.call("sandbox.create", create_body(ONE), timeout=3)
        assert caught.value.code == FaultCode.DEADLINE_EXCEEDED
        for guest in host.guests.values():
            guest.boots = True
        state = await control_plane.call("sandbox.create", create_body(ONE), timeout=30)
        assert state["status"] == "running"
        assert len(host.vms.machines) == 1
        await agent.check()


async def test_a_create_while_the_start_is_failing_hears_why(host, autojump_clock):
    """A retry that comes while the failed first try is cleaned away gets that failure, which it may retry again."""
    host.vms.fail_next_boot("no")
    host.overlays.remove_errors = [storage.StorageTimeout("slow")]
    async with host.agent() as agent:
        sandbox = await agent.manager.create(request(ONE))
        while agent.statuses() != {ONE: "stopping"}:
            await trio.sleep(0.01)
        with pytest.raises(Fault) as caught:
            await agent.create(ONE)
        assert (caught.value.code, caught.value.retryable) == (FaultCode.INTERNAL, True)
        assert sandbox.gone.answered()
        await agent.create(ONE)
        await agent.check()


async def test_memory_admission(host, autojump_clock):
    """What does not fit is refused at once, with the figures; what is being made or removed counts."""
    host.guest_options = {"boots": False}
    async with host.agent(memory_mb=1256) as agent:
        await agent.manager.create(request(ONE, memory_mb=600))
        with pytest.raises(Fault, match="728 of 1256 MiB are taken") as caught:
            await agent.create(TWO, memory_mb=401)
        assert (caught.value.code, caught.value.retryable) == (FaultCode.NO_CAPACITY, True)
        await agent.manager.create(request(sandbox_id(3), memory_mb=400))
        await agent.destroy(ONE)
        await agent.manager.create(request(TWO, memory_mb=600))


async def test_a_disk_that_is_nearly_full(host, autojump_clock):
    """New sandboxes are refused while there is still room for those that run; one that is there is still found."""
    async with host.agent() as agent:
        await agent.create(ONE)
        host.disk_free_mb = admission.DISK_RESERVE_MB - 1
        with pytest.raises(Fault, match="2047 MiB of disk left") as caught:
            await agent.create(TWO)
        assert (caught.value.code, caught.value.retryable) == (FaultCode.NO_CAPACITY, True)
        await agent.create(ONE)
        host.disk_free_mb += 1
        await agent.create(TWO)
        await agent.check()


async def test_an_unknown_template(host, autojump_clock):
    """Not found, without the path of the host's images."""
    async with host.agent() as agent:
        with pytest.raises(Fault, match="does not have the template windows") as caught:
            await agent.create(ONE, template="windows")
        assert caught.value.code == FaultCode.NOT_FOUND
        assert str(host.root) not in caught.value.message
        assert agent.statuses() == {}
