"""What a sandbox is made from on this host: the drivers behind their interfaces, and the figures of the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from agent.guest.driver import Guest
from agent.images.store import ImageStore
from agent.net.backend import SlotBackend
from agent.net.pool import SlotPool
from agent.pager.service import Pager
from agent.sandboxes.outbox import Outbox
from agent.sandboxes.records import StateDirectory
from agent.snapshots.dirty import Descent, DirtyPages, detect
from agent.snapshots.header import COMPACT_AT
from agent.snapshots.store import SnapshotStore
from agent.storage.overlay import OverlayDriver
from agent.vmm.driver import GuestMemory, VmDriver

GUEST_TIMEOUT = 90.0
"""Seconds from a VM's first instruction to its guest daemon's answer. About 4 on a quiet machine under emulation; a
crowded one takes its time."""


Tracking = Callable[[GuestMemory], Callable[[GuestMemory, Descent], DirtyPages]]
"""What finds the dirty pages of a memory on this kernel."""


@dataclass(frozen=True, kw_only=True)
class HostParts:
    """One per daemon; sandbox actors borrow from it.

    At a time: `boots` cold boots, `restores` starts from snapshots, `captures` snapshots being taken, `compactions`.
    `prefetch`: bring working sets in before they are asked for. `tracking`: see there. `compact_generations`: so many
    of a paused sandbox's memory become one.
    """

    state: StateDirectory
    outbox: Outbox
    images: ImageStore
    slots: SlotPool
    slot_backend: SlotBackend
    overlays: OverlayDriver
    vms: VmDriver
    connect_guest: Callable[[str], Guest]
    snapshots: SnapshotStore
    pager: Pager
    boots: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(4))
    restores: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(8))
    captures: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(2))
    compactions: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))
    tracking: Tracking = detect
    prefetch: bool = True
    compact_generations: int = COMPACT_AT
    uid_base: int = 2_000_000
    guest_dns: tuple[str, ...] = ()
    guest_timeout: float = GUEST_TIMEOUT
