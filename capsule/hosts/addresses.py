"""The address a host claims, in its one canonical spelling: two spellings of one address would be two hosts at it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from cryptography import x509

from capsule.config import split_address
from capsule.errors import InvalidRequest

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"({_LABEL}\.)*{_LABEL}")
_NUMBERS = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)")
"""A last label that resolvers take for a number: 127.1, 0x7f.1 and 192.0.2.07 are addresses in disguise."""


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where an agent listens. `text`: host:port as it is stored; `name`: what its certificate is issued for."""

    text: str
    name: x509.GeneralName


def parse_address(text: str) -> HostAddress:
    """The canonical form of `host:port`, host being an IP address or a DNS name. InvalidRequest says what is wrong."""
    try:
        host, port = split_address(text)
    except ValueError as err:
        raise InvalidRequest(f"address: {err}", field="address") from err
    if port == 0:
        raise InvalidRequest("address: port 0 is no port", field="address")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return _named(host.lower().removesuffix("."), port)
    ip = (ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None) or ip
    reserved = ip.version == 4 and ip.is_reserved  # broadcast, too; of IPv6 the loopback address would be
    if ip.is_unspecified or ip.is_multicast or ip.is_link_local or reserved or getattr(ip, "scope_id", None):
        raise InvalidRequest(f"address: {host} cannot be dialled from elsewhere", field="address")
    shown = f"[{ip}]" if ip.version == 6 else str(ip)
    return HostAddress(f"{shown}:{port}", x509.IPAddress(ip))


def _named(host: str, port: int) -> HostAddress:
    if len(host) > 253 or not _NAME.fullmatch(host) or _NUMBERS.fullmatch(host):
        raise InvalidRequest(f"address: {host!r} is neither an IP address nor a DNS name", field="address")
    return HostAddress(f"{host}:{port}", x509.DNSName(host))
