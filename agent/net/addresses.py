"""Names and addresses of a slot, all derived from its number. Pure.

Every guest has the same address and the same MAC: what tells guests apart is the namespace they are in. That is what
lets a snapshot be restored into any slot of any host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from agent.net.errors import InvalidSlotError

GUEST_ADDRESS = "169.254.0.21"
GATEWAY_ADDRESS = "169.254.0.22"
GUEST_PREFIX = 30
GUEST_MAC = "02:fc:00:00:00:01"
TAP_MAC = "02:fc:00:00:00:05"
TAP_NAME = "tap0"
UPLINK_NAME = "eth0"
"""The slot's end of the veth pair, inside the namespace."""

HOST_RANGE = IPv4Network("10.11.0.0/16")
"""Slot n is reached at HOST_RANGE + n."""
VETH_RANGE = IPv4Network("10.12.0.0/15")
"""Slot n's veth pair is the /31 at VETH_RANGE + 2n."""

FIRST_SLOT = 1
LAST_SLOT = 65534
"""Neither the first nor the last address of the /16 is used."""

VETH_PREFIX = "cap"
NAMESPACE_PREFIX = "capsule-"
_NUMBER = "([1-9][0-9]{0,4})"
_VETH_NAME = re.compile(VETH_PREFIX + _NUMBER, re.ASCII)
_NAMESPACE_NAME = re.compile(NAMESPACE_PREFIX + _NUMBER, re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotAddresses:
    """Everything of slot `number` that has a name or an address; addresses are dotted quads."""

    number: int
    namespace: str
    veth: str
    """Host end of the veth pair."""
    host_ip: str
    """Where the host reaches this slot's guest; also the guest's source address on the host."""
    veth_host_ip: str
    veth_slot_ip: str


def slot_addresses(number: int) -> SlotAddresses:
    """Addresses of slot `number`; InvalidSlotError outside FIRST_SLOT..LAST_SLOT."""
    if not FIRST_SLOT <= number <= LAST_SLOT:
        raise InvalidSlotError(f"slot {number} does not exist; slots are {FIRST_SLOT} to {LAST_SLOT}")
    pair = VETH_RANGE.network_address + 2 * number
    return SlotAddresses(
        number=number,
        namespace=f"{NAMESPACE_PREFIX}{number}",
        veth=f"{VETH_PREFIX}{number}",
        host_ip=_text(HOST_RANGE.network_address + number),
        veth_host_ip=_text(pair),
        veth_slot_ip=_text(pair + 1),
    )


def slot_numbers(first: int, count: int) -> range:
    """The configured range of slots; InvalidSlotError if it does not lie within FIRST_SLOT..LAST_SLOT."""
    last = first + count - 1
    if count < 1 or first < FIRST_SLOT or last > LAST_SLOT:
        raise InvalidSlotError(
            f"{count} slots from {first} on do not fit; slots are {FIRST_SLOT} to {LAST_SLOT}, at least one"
        )
    return range(first, last + 1)


def slot_of_veth(name: str) -> int | None:
    """Number of the slot whose host-side veth is called `name`, None for any other interface."""
    return _number(_VETH_NAME.fullmatch(name))


def slot_of_namespace(name: str) -> int | None:
    """Number of the slot whose namespace is called `name`, None for any other namespace."""
    return _number(_NAMESPACE_NAME.fullmatch(name))


def _number(match: re.Match[str] | None) -> int | None:
    if match is None:
        return None
    number = int(match[1])
    return number if number <= LAST_SLOT else None


def _text(address: IPv4Address) -> str:
    return str(address)
