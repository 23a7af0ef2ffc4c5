"""The link to a guest daemon, and what a guest must be told before anybody else talks to it: who it is, the time, and
random numbers that no clone of it has."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import structlog
import trio

from agent.actor.supervise import RestartPolicy, supervise
from agent.net.addresses import slot_addresses
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from agent.guest.driver import Guest
    from agent.sandboxes.made import Made
    from agent.sandboxes.parts import HostParts

log = structlog.get_logger()

ENTROPY_BYTES = 64
CONFIGURE_TIMEOUT = 10.0
SETTLE_TIMEOUT = 3.0
"""Seconds a guest gets to freeze its processes and to write what its disk cache holds; then it is paused as it is."""
SETTLE_GRACE = 0.5
THAW_TIMEOUT = 5.0

GUEST_LINK = RestartPolicy(max_delay=10)
"""A bug that one guest has found in the link to it must not end the agent of all."""


def connect(parts: HostParts, made: Made, nursery: trio.Nursery) -> Guest:
    """Start the link to the guest daemon in `nursery`. Only `Made.unlink` ends it: whoever is cancelled while the guest
    stands still has something to tell it first."""
    guest = made.guest = parts.connect_guest(slot_addresses(made.record.slot).host_ip)
    scope = made.link = trio.CancelScope(shield=True)

    async def keep() -> None:
        with scope:
            await supervise("guest_link", guest.run, GUEST_LINK)

    nursery.start_soon(keep)
    return guest


async def greet(parts: HostParts, made: Made, nursery: trio.Nursery, *, envs: dict[str, str] | None) -> None:
    """Wait for the guest daemon and tell it who it is; no longer than the VM lives. Raises Fault.

    `envs` None: it keeps the defaults that it has.
    """
    assert made.vm is not None  # noqa: S101 - started just now
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


async def _introduce(parts: HostParts, made: Made, envs: dict[str, str] | None, guest: Guest) -> None:
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
        "machine_id": made.record.sandbox_id.replace("-", ""),
        "dns": list(parts.guest_dns),
        "time_ns": time.time_ns(),
        "entropy": os.urandom(ENTROPY_BYTES),
    }
    if envs is not None:
        question["envs"] = envs
    try:
        answer = await guest.call("configure", question, timeout=CONFIGURE_TIMEOUT)
    except Fault as err:  # the guest's own words and code mean nothing to whoever asked for a sandbox
        log.warning("guest_not_configured", code=err.code, message=err.message)
        raise Fault(FaultCode.UNAVAILABLE, "the guest did not take its configuration", retryable=True) from err
    if answer.get("failed"):
        log.warning("guest_files_not_written", files=str(answer["failed"])[:200])


async def settle(guest: Guest) -> None:
    """Have the guest freeze its processes and write its disk cache. Best effort: what does not answer is paused all
    the same."""
    body = {"timeout_ms": round(SETTLE_TIMEOUT * 1000)}
    try:
        with trio.move_on_after(SETTLE_TIMEOUT + SETTLE_GRACE):
            await guest.call("settle", body, timeout=SETTLE_TIMEOUT)
            return
        log.warning("guest_not_settled", reason="no answer")
    except Fault as err:
        log.warning("guest_not_settled", reason=str(err))


async def thaw(guest: Guest, *, patience: float) -> bool:
    """Let the guest's processes go on; harmless if they do. `patience`: seconds to wait for a connection.

    Best effort: False when it gave no answer. It thaws by itself after a minute.
    """
    try:
        with trio.move_on_after(patience + THAW_TIMEOUT):
            await guest.wait_connected(trio.current_time() + patience)
            await guest.call("thaw", {}, timeout=THAW_TIMEOUT)
            return True
        log.warning("guest_not_thawed", reason="no answer")
    except Fault as err:
        log.warning("guest_not_thawed", reason=str(err))
    return False
