"""Links, addresses, routes and neighbours of one namespace: pyroute2 wrapped in the few intents a slot needs.

pyroute2's sockets are bound to the namespace *and to the thread* they were opened in. A Links is opened, used and
closed within one SlotThread; it keeps to the namespace it was opened in, also after the thread has entered another.
"""

from __future__ import annotations

import errno
import socket
from contextlib import contextmanager
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUTE_PROTOCOL = 0xCA
"""Marks the routes this program put in, as `ip route` shows them (proto 202); nothing else uses it."""
_MAIN_TABLE = 254
_PERMANENT = 0x80
"""NUD_PERMANENT: never aged, never asked for."""


class Links:
    """One namespace's links; every method is one or two round trips and raises NetlinkError as the kernel answers."""

    def __init__(self, route: Any) -> None:
        self._route = route

    def add_veth(self, name: str, *, peer: str, peer_namespace: int) -> None:
        """Make a veth pair: `name` here, `peer` in the namespace that the descriptor `peer_namespace` stands for."""
        self._route.link("add", ifname=name, kind="veth", peer={"ifname": peer, "net_ns_fd": peer_namespace})

    def index(self, name: str) -> int | None:
        """Index of link `name`, None if there is none."""
        found = self._link(name)
        return None if found is None else int(found["index"])

    def is_veth(self, name: str) -> bool:
        """Whether `name` is there and is a veth."""
        found = self._link(name)
        return found is not None and found.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "veth"

    def remove_veth(self, name: str) -> None:
        """Remove `name` and its peer, with their addresses and routes; nothing happens unless it is a veth."""
        if not self.is_veth(name):
            return
        try:
            self._route.link("del", ifname=name)
        except NetlinkError as err:
            if err.code != errno.ENODEV:
                raise

    def set_mac(self, index: int, mac: str) -> None:
        self._route.link("set", index=index, address=mac)

    def set_up(self, index: int) -> None:
        self._route.link("set", index=index, state="up")

    def add_address(self, index: int, address: str, prefix: int) -> None:
        self._route.addr("add", index=index, address=address, prefixlen=prefix)

    def add_neighbour(self, index: int, address: str, mac: str) -> None:
        """Pin `address` to `mac`, so that the first packet waits for no ARP."""
        self._route.neigh("add", ifindex=index, dst=address, lladdr=mac, state=_PERMANENT)

    def passing_neighbours(self) -> list[str]:
        """Addresses that were learnt from traffic, not pinned."""
        return [
            str(entry.get_attr("NDA_DST"))
            for entry in self._route.get_neighbours(family=socket.AF_INET)
            if entry["state"] != _PERMANENT
        ]

    def add_route(self, index: int, destination: str, *, gateway: str, source: str | None = None) -> None:
        chosen = {} if source is None else {"prefsrc": source}
        self._route.route("add", dst=destination, gateway=gateway, oif=index, **chosen)

    def add_unreachable(self, network: IPv4Network) -> None:
        """Refuse `network` unless a more specific route says otherwise; FileExistsError if it is routed elsewhere."""
        try:
            self._route.route("add", dst=str(network), type="unreachable", proto=ROUTE_PROTOCOL)
        except NetlinkError as err:
            if err.code != errno.EEXIST:
                raise
            if not self._unreachable(network):
                raise FileExistsError(err.code, "routed elsewhere", str(network)) from err

    def remove_unreachable(self, network: IPv4Network) -> None:
        """Take our own unreachable route for `network` away; no error if there is none."""
        if self._unreachable(network):
            self._route.route("del", dst=str(network), type="unreachable", proto=ROUTE_PROTOCOL)

    def routes_within(self, network: IPv4Network) -> list[tuple[IPv4Network, str | None]]:
        """Routes of the main table into `network`, each with the name of its link (None: an unreachable one)."""
        return [
            (route, None if index is None else self._name(index))
            for route, index, _message in self._main_routes()
            if route.subnet_of(network)
        ]

    def _unreachable(self, network: IPv4Network) -> bool:
        return any(
            route == network and message["proto"] == ROUTE_PROTOCOL for route, _index, message in self._main_routes()
        )

    def _main_routes(self) -> Iterator[tuple[IPv4Network, int | None, Any]]:
        for message in self._route.get_routes(family=socket.AF_INET, table=_MAIN_TABLE):
            destination = IPv4Network((message.get_attr("RTA_DST") or 0, message["dst_len"]))
            yield destination, message.get_attr("RTA_OIF"), message

    def _name(self, index: int) -> str:
        try:
            return socket.if_indextoname(index)
        except OSError:
            return f"link {index}"

    def _link(self, name: str) -> Any:
        try:
            return next(iter(self._route.link("get", ifname=name)), None)
        except NetlinkError as err:
            if err.code == errno.ENODEV:
                return None
            raise


@contextmanager
def open_links() -> Iterator[Links]:
    """Links of the namespace that the calling thread is in now."""
    with IPRoute() as route:
        yield Links(route)
