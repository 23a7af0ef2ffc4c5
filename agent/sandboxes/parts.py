"""What a sandbox is made from on this host: the drivers behind their interfaces, and the figures of the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from agent.guest.driver import Guest
from agent.images.store import ImageStore
from agent.net.backend import SlotBackend
from agent.net.pool import SlotPool
from agent.sandboxes.outbox import Outbox
from agent.sandboxes.records import StateDirectory
from agent.storage.overlay import OverlayDriver
from agent.vmm.driver import VmDriver

GUEST_TIMEOUT = 90.0
"""Seconds from a VM's first instruction to its guest daemon's answer. About 4 on a quiet machine under emulation; a
crowded one takes its time."""


@dataclass(frozen=True, kw_only=True)
class HostParts:
    """One per daemon; sandbox actors borrow from it."""

    state: StateDirectory
    outbox: Outbox
    images: ImageStore
    slots: SlotPool
    slot_backend: SlotBackend
    overlays: OverlayDriver
    vms: VmDriver
    connect_guest: Callable[[str], Guest]
    boots: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(4))
    uid_base: int = 2_000_000
    guest_dns: tuple[str, ...] = ()
    guest_timeout: float = GUEST_TIMEOUT
