"""The rulesets' text."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from hypothesis import example, given
from hypothesis import strategies as st

from agent.net.addresses import GUEST_ADDRESS, HOST_RANGE, VETH_RANGE, slot_addresses
from agent.net.rules import CLOSED_NETWORKS, host_rules, slot_rules

CLOSED = [IPv4Network(network) for network in CLOSED_NETWORKS]
DOCUMENTATION = [IPv4Network(net) for net in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")]
"""Not global either, but nobody's: our tests' internet lies there."""


@given(st.ip_addresses(v=4))
@example(IPv4Address("169.254.169.254"))
@example(IPv4Address("100.100.100.200"))
@example(IPv4Address("192.0.0.192"))
@example(IPv4Address("255.255.255.255"))
@example(IPv4Address(GUEST_ADDRESS))
def test_everything_but_the_public_internet_is_closed(address):
    """Python's own registry of special networks is the judge: not global means closed."""
    closed = any(address in network for network in CLOSED)
    assert closed or address.is_global or any(address in network for network in DOCUMENTATION)


def test_slots_own_ranges_are_closed():
    """A guest reaches neither another slot nor the host by the addresses that slots are made of."""
    for network in (HOST_RANGE, VETH_RANGE):
        assert any(network.subnet_of(closed) for closed in CLOSED)


def test_closed_networks_do_not_overlap():
    """An interval set with overlaps is refused by nftables."""
    assert not any(one.overlaps(other) for one in CLOSED for other in CLOSED if one is not other)


def test_host_rules_touch_only_their_own_table():
    """Every table named in the host's rules is ours, and nothing flushes the whole ruleset."""
    lines = [line.strip() for line in host_rules().splitlines()]
    tables = {line.removesuffix(" {").split()[-1] for line in lines if "table" in line}
    assert tables == {"capsule"}
    assert not any(line.startswith("flush") for line in lines)


def test_slot_rules_name_the_slot():
    """The one ruleset is filled with the slot's own addresses."""
    text = slot_rules(slot_addresses(5))
    assert "ip daddr 10.11.0.5 dnat to 169.254.0.21" in text
    assert "ip saddr 10.12.0.10 snat to 169.254.0.22" in text
