"""Kernel parameters below /proc/sys/net; they are those of the calling thread's network namespace."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_ROOT = Path("/proc/sys/net")

IP_FORWARD = "ipv4/ip_forward"


def read_sysctl(name: str) -> str:
    return (_ROOT / name).read_text(encoding="ascii").strip()


def write_sysctl(name: str, value: str) -> None:
    (_ROOT / name).write_text(value, encoding="ascii")


def configure_slot_namespace() -> None:
    """Forward between the slot's two devices, and do nothing else for its guest."""
    write_sysctl(IP_FORWARD, "1")  # first: it sets others back to the defaults of a router
    write_sysctl("ipv4/conf/all/rp_filter", "1")
    write_sysctl("ipv4/conf/all/accept_redirects", "0")
    # Both, since a redirect is sent when either allows it.
    write_sysctl("ipv4/conf/all/send_redirects", "0")
    write_sysctl("ipv4/conf/default/send_redirects", "0")
    # A guest asking its tap for the veth's address learns nothing about the host.
    write_sysctl("ipv4/conf/all/arp_ignore", "1")
    with suppress(FileNotFoundError):  # a kernel without IPv6
        write_sysctl("ipv6/conf/all/disable_ipv6", "1")
        write_sysctl("ipv6/conf/default/disable_ipv6", "1")
