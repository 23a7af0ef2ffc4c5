"""Whose address a request comes from: the socket's peer, or what proxies that the operator trusts say of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypercorn.typing import HTTPScope

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

FORWARDED = b"x-forwarded-for"
UNKNOWN = "unknown"
MAX_HOPS = 32
"""Hops that are looked at, from the nearest on; who has more proxies than that is making them up."""


@dataclass(frozen=True, slots=True)
class ClientAddresses:
    """Takes X-Forwarded-For from `trusted` networks only: anybody can send the header."""

    trusted: Sequence[Network] = ()

    def of(self, scope: HTTPScope) -> str:
        """The client's address in normal form: the hop nearest to us that is no trusted proxy. A hop that is no address
        ends the search: what stands before it is hearsay."""
        client = scope.get("client")
        peer = None if client is None else _parse(str(client[0]))
        if peer is None:
            return UNKNOWN
        if not self._trusts(peer):
            return str(peer)
        for hop in _hops(scope["headers"]):
            address = _parse(hop)
            if address is None:
                break
            peer = address
            if not self._trusts(address):
                break
        return str(peer)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self.trusted)


def _hops(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """From the nearest to the farthest. Header lines of one name are one list (RFC 9110 §5.3)."""
    lines = [value.decode("latin-1") for name, value in headers if name.lower() == FORWARDED]
    return [hop.strip() for hop in ",".join(lines).rsplit(",", MAX_HOPS)[::-1][:MAX_HOPS]] if lines else []


def _parse(text: str) -> Address | None:
    """`192.0.2.7`, `2001:db8::1`, either with a port (`192.0.2.7:80`, `[2001:db8::1]:80`); None for anything else."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
