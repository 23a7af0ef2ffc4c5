"""Making one sandbox, step by step: slot, overlay, VM, guest. What each step made is noted in `Made` at once, so that
whoever takes the sandbox down knows what there is, however far the build came."""

from __future__ import annotations

import errno
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from agent.actor.supervise import RestartPolicy, supervise
from agent.net.addresses import GUEST_MAC, slot_addresses
from agent.net.errors import NetworkError, NoFreeSlots
from agent.sandboxes.records import ProcessRecord, Record
from agent.storage.overlay import HostDiskFull, StorageError
from agent.vmm.driver import Vm, VmmError, VmSpec
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.guest.driver import Guest
    from agent.net.ledger import Slot
    from agent.sandboxes.parts import HostParts

log = structlog.get_logger()

DISK_FILE = "disk.qcow2"
ENTROPY_BYTES = 64
CONFIGURE_TIMEOUT = 10.0
SLOT_TIMEOUT = 30.0
"""Seconds to wait for a slot that is being made; one takes tens of milliseconds. A build holds up others meanwhile."""

GUEST_LINK = RestartPolicy(max_delay=10)
"""A bug that one guest has found in the link to it must not end the agent of all."""


@dataclass
class Made:
    """What exists of a sandbox on this host."""

    record: Record
    slot: Slot | None = None
    vm: Vm | None = None
    guest: Guest | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step."""
        began = time.perf_counter()
        yield
        self.timings_ms[name] = round((time.perf_counter() - began) * 1000, 1)


async def save(parts: HostParts, made: Made, **changes: object) -> None:
    """Change the record, on disk first."""
    record = msgspec.structs.replace(made.record, **changes)
    await trio.to_thread.run_sync(parts.state.save, record)
    made.record = record


async def build(parts: HostParts, made: Made, *, envs: dict[str, str], nursery: trio.Nursery) -> None:
    """Make everything; the guest answers when this returns. Raises only Fault; cancellable at any point.

    `nursery` gets the guest link's task.
    """
    try:
        with made.step("queue"):
            await parts.boots.acquire()
        try:
            await _boot(parts, made)
            with made.step("guest"):
                await _greet(parts, made, envs, nursery)
        finally:
            parts.boots.release()
        await save(parts, made, phase="running", started_at=time.time())
    except Fault:
        raise
    except Exception as err:
        raise as_fault(err) from err


async def _boot(parts: HostParts, made: Made) -> None:
    directory = parts.state.directory(made.record.sandbox_id)
    with made.step("slot"):
        slot = await _take_slot(parts, made)
    with made.step("overlay"):
        await parts.overlays.create(Path(made.record.rootfs), directory / DISK_FILE, made.record.disk_mb)
    with made.step("vmm"):
        tap = await parts.slot_backend.open_tap(slot.number)
        try:
            made.vm = await parts.vms.boot(spec(parts, made.record, tap_fd=tap))
        finally:
            os.close(tap)
        process = made.vm.process
        await save(parts, made, process=ProcessRecord(process.pid, process.start_time))


async def _take_slot(parts: HostParts, made: Made) -> Slot:
    with trio.move_on_after(SLOT_TIMEOUT):
        made.slot = await parts.slots.acquire()
    if made.slot is None:
        raise Fault(FaultCode.NO_CAPACITY, "this host could not make a network slot in time", retryable=True)
    await save(parts, made, slot=made.slot.number)
    return made.slot


async def _greet(parts: HostParts, made: Made, envs: dict[str, str], nursery: trio.Nursery) -> None:
    """Wait for the guest daemon and tell it who it is; no longer than the VM lives."""
    assert made.vm is not None  # noqa: S101 - booted just now
    vm, guest = made.vm, connect(parts, made, nursery)
    failure: Fault | None = None

    async def watch_vm() -> None:
        nonlocal failure
        log.warning("vm_ended_at_start", reason=await vm.wait_exit())
        failure = Fault(FaultCode.UNAVAILABLE, "the sandbox's VM ended while it started", retryable=True)
        watching.cancel_scope.cancel()

    async with trio.open_nursery() as watching:
        watching.start_soon(watch_vm)
        try:
            await _introduce(parts, made, envs, guest)
        except Fault as fault:
            failure = failure or fault
        watching.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _introduce(parts: HostParts, made: Made, envs: dict[str, str], guest: Guest) -> None:
    silent: Fault | None = None
    try:
        await guest.wait_connected(trio.current_time() + parts.guest_timeout)
    except Fault as fault:
        silent = fault
    if silent is not None:
        console = "" if made.vm is None else await made.vm.console_tail()
        log.warning("guest_silent", reason=silent.message, console=console[-2000:])
        raise Fault(FaultCode.UNAVAILABLE, f"the guest did not come up in {parts.guest_timeout:g} s", retryable=True)
    question = {
        "hostname": made.record.hostname,
        "dns": list(parts.guest_dns),
        "envs": envs,
        "time_ns": time.time_ns(),
        "entropy": os.urandom(ENTROPY_BYTES),
    }
    try:
        await guest.call("configure", question, timeout=CONFIGURE_TIMEOUT)
    except Fault as err:  # the guest's own words and code mean nothing to whoever asked for a sandbox
        log.warning("guest_not_configured", code=err.code, message=err.message)
        raise Fault(FaultCode.UNAVAILABLE, "the guest did not take its configuration", retryable=True) from err


def connect(parts: HostParts, made: Made, nursery: trio.Nursery) -> Guest:
    """Start the link to the guest daemon in `nursery`."""
    guest = made.guest = parts.connect_guest(slot_addresses(made.record.slot).host_ip)
    nursery.start_soon(supervise, "guest_link", guest.run, GUEST_LINK)
    return guest


def spec(parts: HostParts, record: Record, *, tap_fd: int) -> VmSpec:
    """The VM of a record. Each slot has a user of its own, so one VMM cannot touch another's files or process."""
    directory = parts.state.directory(record.sandbox_id)
    return VmSpec(
        sandbox_id=record.sandbox_id,
        directory=directory,
        vcpus=record.vcpus,
        memory_mb=record.memory_mb,
        kernel=Path(record.kernel),
        initramfs=Path(record.initramfs),
        disk=directory / DISK_FILE,
        disk_format="qcow2",
        tap_fd=tap_fd,
        mac=GUEST_MAC,
        uid=parts.uid_base + record.slot,
        gid=parts.uid_base + record.slot,
        network_namespace=parts.slot_backend.namespace(record.slot),
    )


def as_fault(err: Exception) -> Fault:
    """A driver's failure in the words of the wire. The message names no path of the host."""
    match err:
        case NoFreeSlots():
            fault = Fault(FaultCode.NO_CAPACITY, "this host has no free network slot", retryable=True)
        case HostDiskFull() | OSError(errno=errno.ENOSPC | errno.EDQUOT):
            fault = Fault(FaultCode.NO_CAPACITY, "this host's disk is full", retryable=True)
        case _:
            what = type(err).__name__
            fault = Fault(FaultCode.INTERNAL, f"the host could not start the sandbox ({what})", retryable=True)
    expected = isinstance(err, NetworkError | StorageError | VmmError | OSError)
    log.warning("sandbox_step_failed", error=type(err).__name__, message=str(err), exc_info=None if expected else err)
    return fault
