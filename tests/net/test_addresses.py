"""Names and addresses of slots."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.net.addresses import (
    FIRST_SLOT,
    HOST_RANGE,
    LAST_SLOT,
    VETH_RANGE,
    slot_addresses,
    slot_numbers,
    slot_of_namespace,
    slot_of_veth,
)
from agent.net.errors import InvalidSlotError

numbers = st.integers(FIRST_SLOT, LAST_SLOT)


def test_known_slots():
    """The contract's arithmetic, by example, at both ends of the range."""
    first, last = slot_addresses(1), slot_addresses(LAST_SLOT)
    assert (first.host_ip, first.veth_host_ip, first.veth_slot_ip) == ("10.11.0.1", "10.12.0.2", "10.12.0.3")
    assert (last.host_ip, last.veth_host_ip, last.veth_slot_ip) == ("10.11.255.254", "10.13.255.252", "10.13.255.253")
    assert (first.namespace, first.veth) == ("capsule-1", "cap1")


@given(numbers)
def test_every_address_lies_in_its_range(number):
    """So the host's unreachable routes and NAT rule cover every slot, and a veth name fits the kernel's 15 bytes."""
    slot = slot_addresses(number)
    assert IPv4Address(slot.host_ip) in HOST_RANGE
    assert IPv4Address(slot.veth_host_ip) in VETH_RANGE
    assert IPv4Address(slot.veth_slot_ip) in VETH_RANGE
    assert int(IPv4Address(slot.veth_host_ip)) ^ int(IPv4Address(slot.veth_slot_ip)) == 1, "the two ends of one /31"
    assert len(slot.veth) <= 15


@given(numbers, numbers)
def test_two_slots_share_nothing(one, other):
    """No name and no address belongs to two slots, nor does a veth address double as a host address."""

    def everything(number):
        slot = slot_addresses(number)
        return {slot.namespace, slot.veth, slot.host_ip, slot.veth_host_ip, slot.veth_slot_ip}

    assert len(everything(one)) == 5
    assert one == other or not everything(one) & everything(other)


@given(numbers)
def test_names_lead_back_to_the_number(number):
    """Collecting finds the slot from either half of it."""
    slot = slot_addresses(number)
    assert slot_of_veth(slot.veth) == number
    assert slot_of_namespace(slot.namespace) == number


@given(st.text(alphabet="cap sule-0123456789²\n", max_size=16))
def test_only_canonical_names_are_ours(name):
    """Anything that is not exactly a slot's name is somebody else's and is never removed."""
    for number in (slot_of_veth(name), slot_of_namespace(name)):
        assert number is None or name in {slot_addresses(number).veth, slot_addresses(number).namespace}


@pytest.mark.parametrize("number", [-1, 0, LAST_SLOT + 1, 99999])
def test_numbers_outside_the_range_are_refused(number):
    """Neither the network's first address nor its last can be a slot's."""
    with pytest.raises(InvalidSlotError):
        slot_addresses(number)
    assert slot_of_veth(f"cap{number}") is None


@pytest.mark.parametrize(("first", "count"), [(0, 5), (1, 0), (1, 65535), (65534, 2)])
def test_ranges_that_do_not_fit_are_refused(first, count):
    """A configured range is checked as a whole, before any slot is made."""
    with pytest.raises(InvalidSlotError):
        slot_numbers(first, count)


def test_range():
    """First and count give the numbers, both ends included."""
    assert list(slot_numbers(7, 3)) == [7, 8, 9]
