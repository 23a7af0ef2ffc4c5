"""The nftables rulesets, as text: one table `capsule` in every slot, one on the host. Pure.

A guest's packet meets three fences: its slot (only its own source, only public destinations), the host's forward hook
(the same again, and nothing between slots) and the host's input hook (no address of the host, whichever it is).
"""

from __future__ import annotations

from agent.net.addresses import (
    GATEWAY_ADDRESS,
    GUEST_ADDRESS,
    HOST_RANGE,
    TAP_NAME,
    UPLINK_NAME,
    VETH_PREFIX,
    SlotAddresses,
)

TABLE = "capsule"

CLOSED_NETWORKS = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",  # link-local, where clouds keep their metadata
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/3",  # multicast, reserved, broadcast
)
"""What no guest may reach: everything that is not the public internet."""

_CLOSED_SET = f"set closed {{ type ipv4_addr; flags interval; elements = {{ {', '.join(CLOSED_NETWORKS)} }}; }}"


MAX_FLOWS = 2000
"""Connections a guest may have at once: they are also the host's to track, and to forget when the slot goes."""


def slot_rules(slot: SlotAddresses) -> str:
    """Rules inside the slot's namespace. The guest sees only its gateway, the host sees only host_ip."""
    return f"""
table ip {TABLE} {{
  {_CLOSED_SET}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "{UPLINK_NAME}" ip daddr {slot.host_ip} dnat to {GUEST_ADDRESS}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{TAP_NAME}" ip saddr {slot.veth_host_ip} snat to {GATEWAY_ADDRESS}
    oifname "{UPLINK_NAME}" ip saddr {GUEST_ADDRESS} snat to {slot.host_ip}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "{TAP_NAME}" ip saddr != {GUEST_ADDRESS} counter drop
    iifname "{TAP_NAME}" ct state new ct count over {MAX_FLOWS} counter drop
    ct state established,related accept
    iifname "{UPLINK_NAME}" oifname "{TAP_NAME}" ip saddr {slot.veth_host_ip} ip daddr {GUEST_ADDRESS} accept
    ip daddr @closed counter drop
    iifname "{TAP_NAME}" oifname "{UPLINK_NAME}" ip protocol {{ icmp, tcp, udp }} accept
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
  }}
}}
"""


def host_rules() -> str:
    """Rules of the host, replacing an earlier version of themselves in one transaction; other tables are not touched.

    They hold even where another program's rules translate a destination: these hooks see the packet after that.
    """
    return f"""
add table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
  {_CLOSED_SET}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {HOST_RANGE} oifname != "{VETH_PREFIX}*" masquerade
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{VETH_PREFIX}*" jump from_slot
    oifname "{VETH_PREFIX}*" jump to_slot
  }}
  chain from_slot {{
    meta nfproto ipv6 counter drop
    ct state invalid counter drop
    oifname "{VETH_PREFIX}*" counter drop
    ip saddr != {HOST_RANGE} counter drop
    ip daddr @closed counter drop
  }}
  chain to_slot {{
    meta nfproto ipv4 ct state established,related accept
    counter drop
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname "{VETH_PREFIX}*" meta nfproto ipv4 ct state established,related accept
    iifname "{VETH_PREFIX}*" counter drop
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    oifname "{VETH_PREFIX}*" meta nfproto ipv6 drop
    oifname "{VETH_PREFIX}*" meta skuid != 0 counter drop
  }}
}}
"""


def no_host_rules() -> str:
    """Take the host's table away; no error if there is none."""
    return f"add table inet {TABLE}\ndelete table inet {TABLE}\n"
