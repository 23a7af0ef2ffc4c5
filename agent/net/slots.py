"""Build, remove and look at one slot: namespace, firewall, tap, veth pair, addresses, routes.

All functions here run in a SlotThread that is in the host's namespace (`run_in_slot_thread`). A slot that is given
back is removed and built anew, never cleaned: whatever a tenant left (flows, neighbours, queueing disciplines) dies
with the namespace, and there is no list of things to reset that a new feature could forget to extend.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from agent.net.addresses import (
    GATEWAY_ADDRESS,
    GUEST_ADDRESS,
    GUEST_MAC,
    GUEST_PREFIX,
    TAP_MAC,
    TAP_NAME,
    UPLINK_NAME,
    SlotAddresses,
    slot_addresses,
    slot_of_namespace,
    slot_of_veth,
)
from agent.net.conntrack import flow_count, forget_address
from agent.net.errors import SlotCreateError, SlotInspectError, SlotRemoveError, TapError
from agent.net.firewall import apply_rules
from agent.net.namespace import (
    create_namespace,
    delete_namespace,
    enter_namespace,
    namespace_names,
    own_namespace,
)
from agent.net.netlink import Links, open_links
from agent.net.rules import slot_rules
from agent.net.sysctl import configure_slot_namespace
from agent.net.tap import add_persistent_tap, open_tap_here
from agent.net.threads import require_slot_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

CREATE_STEPS = ("namespace", "sysctls", "firewall", "tap", "veth", "slot side", "host side", "default route")


@dataclass(frozen=True, slots=True)
class _Site:
    """What the steps of one creation work on."""

    slot: SlotAddresses
    host: Links
    host_namespace: int
    add_tap: Callable[[], None]


def create_slot(
    number: int,
    *,
    add_tap: Callable[[], None] = add_persistent_tap,
    before_step: Callable[[str], None] = lambda _step: None,
) -> None:
    """Build slot `number`. SlotCreateError if it cannot be, after everything made so far was undone, last thing first.

    A slot that exists is left as it is, and an error. `add_tap` makes the device called tap0 in the namespace it is
    called in; `before_step` is told the name of each of CREATE_STEPS (tests stand in with both).
    """
    require_slot_thread()
    slot = slot_addresses(number)
    undo: list[Callable[[], None]] = []
    try:
        with open_links() as host, own_namespace() as host_namespace:
            site = _Site(slot, host, host_namespace, add_tap)
            try:
                _build(site, undo, before_step)
            except Exception as err:
                if failures := _run_all(reversed(undo)):
                    raise ExceptionGroup("failed, and so did undoing it", [err, *failures]) from None
                raise
    except Exception as err:
        raise SlotCreateError(f"slot {number} could not be built: {err}") from err


def _build(site: _Site, undo: list[Callable[[], None]], before_step: Callable[[str], None]) -> None:
    slot = site.slot
    before_step("namespace")
    create_namespace(slot.namespace)  # from here on the thread is in the slot
    undo.append(partial(delete_namespace, slot.namespace))
    before_step("sysctls")
    configure_slot_namespace()
    before_step("firewall")
    apply_rules(slot_rules(slot))  # before there is a device that a packet could come from
    before_step("tap")
    site.add_tap()
    with open_links() as links:
        before_step("veth")
        links.add_veth(UPLINK_NAME, peer=slot.veth, peer_namespace=site.host_namespace)
        undo.append(partial(site.host.remove_veth, slot.veth))
        before_step("slot side")
        uplink = _configure_slot_side(slot, links)
        before_step("host side")
        _configure_host_side(slot, site.host)
        before_step("default route")
        links.add_route(uplink, "0.0.0.0/0", gateway=slot.veth_host_ip)


def _configure_slot_side(slot: SlotAddresses, links: Links) -> int:
    tap, uplink = socket.if_nametoindex(TAP_NAME), socket.if_nametoindex(UPLINK_NAME)
    links.add_address(uplink, slot.veth_slot_ip, 31)
    links.set_up(uplink)
    links.set_mac(tap, TAP_MAC)
    links.add_address(tap, GATEWAY_ADDRESS, GUEST_PREFIX)
    links.set_up(tap)
    # A restored guest does not announce itself: without this its first packet waits for ARP.
    links.add_neighbour(tap, GUEST_ADDRESS, GUEST_MAC)
    return uplink


def _configure_host_side(slot: SlotAddresses, host: Links) -> None:
    index = host.index(slot.veth)
    if index is None:
        raise OSError(errno.ENODEV, "the veth has just been made and is gone", slot.veth)
    host.add_address(index, slot.veth_host_ip, 31)
    host.set_up(index)
    host.add_route(index, f"{slot.host_ip}/32", gateway=slot.veth_slot_ip, source=slot.veth_host_ip)


def remove_slot(number: int) -> None:
    """Remove slot `number`, whole, half-made or absent. Every step is tried; SlotRemoveError reports all that failed.

    The veth goes first and at once, with its addresses and routes: nothing reaches the slot from then on,
    even if a VM that was not reaped still holds its tap and so keeps the (now nameless) namespace.
    """
    require_slot_thread()
    slot = slot_addresses(number)
    steps = (
        partial(_remove_veth, slot.veth),
        partial(delete_namespace, slot.namespace),
        partial(forget_address, slot.host_ip),
    )
    if failures := _run_all(steps):
        group = ExceptionGroup(f"removing slot {number}", failures)
        raise SlotRemoveError(f"slot {number} could not be removed: {'; '.join(map(str, failures))}") from group


def _remove_veth(name: str) -> None:
    with open_links() as host:
        host.remove_veth(name)


def existing_slots() -> set[int]:
    """Numbers of all slots of which anything exists: a namespace, a veth, or only one of them."""
    require_slot_thread()
    try:
        found = {slot_of_namespace(name) for name in namespace_names()}
        candidates = [name for _index, name in socket.if_nameindex() if slot_of_veth(name) is not None]
        with open_links() as host:
            found |= {slot_of_veth(name) for name in candidates if host.is_veth(name)}
    except Exception as err:
        raise SlotInspectError(f"the slots of this host could not be listed: {err}") from err
    return {number for number in found if number is not None}


def slot_is_clean(number: int) -> bool:
    """Whether slot `number` is whole and has seen no traffic: both devices, no flow, no neighbour learnt."""
    require_slot_thread()
    slot = slot_addresses(number)
    try:
        with open_links() as host:
            whole = host.is_veth(slot.veth) and slot.namespace in namespace_names()
        if not whole:
            return False
        enter_namespace(slot.namespace)
        devices = {name for _index, name in socket.if_nameindex()}
        with open_links() as links:
            learnt = links.passing_neighbours()
        return {TAP_NAME, UPLINK_NAME} <= devices and not learnt and flow_count() == 0
    except Exception as err:
        raise SlotInspectError(f"slot {number} could not be inspected: {err}") from err


def open_tap(number: int) -> int:
    """A descriptor of slot `number`'s tap (TAP, no packet information, vnet header; non-blocking, close-on-exec).

    The caller owns it: hand it to the VMM, close it, and reap the VMM before the slot is released. TapError if there
    is no such slot or the tap is still open elsewhere.
    """
    require_slot_thread()
    try:
        enter_namespace(slot_addresses(number).namespace)
        return open_tap_here()
    except OSError as err:
        raise TapError(f"the tap of slot {number} could not be opened: {err}") from err


def _run_all(steps: Iterable[Callable[[], object]]) -> list[Exception]:
    """Run every step whatever the others do; the errors, in order."""
    failures: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as err:  # noqa: BLE001 - collected, and raised together by the caller
            failures.append(err)
    return failures
