"""Connection tracking of one namespace: what it still remembers about an address, and making it forget.

A slot's own table dies with its namespace. The host's does not: it remembers a guest's flows by host_ip, for days if
the connection was never closed, and would let the slot's next tenant into its predecessor's NAT mappings.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from pyroute2.conntrack import NFCTAttrTuple, NFCTSocket
from pyroute2.netlink.exceptions import NetlinkError

if TYPE_CHECKING:
    from collections.abc import Iterator


def forget_address(address: str) -> int:
    """Delete the flows of the calling thread's namespace that began from or to `address`; returns how many."""
    forgotten = 0
    with NFCTSocket() as table:
        for flow in list(_flows(table, address)):
            forgotten += _forget(table, flow)
    return forgotten


def flow_count() -> int:
    """How many flows the calling thread's namespace remembers."""
    with NFCTSocket() as table:
        return sum(1 for _flow in table.dump())


def _flows(table: Any, address: str) -> Iterator[Any]:
    """Original tuples of the flows. Kernels before 5.8 do not filter the dump, so each is looked at again."""
    for wanted in (NFCTAttrTuple(saddr=address), NFCTAttrTuple(daddr=address)):
        for message in table.dump(tuple_orig=wanted):
            found = message.get_attr("CTA_TUPLE_ORIG")
            if found is not None and wanted.nla_eq(wanted.family, found):
                yield NFCTAttrTuple.from_netlink(wanted.family, found)


def _forget(table: Any, flow: Any) -> int:
    try:
        table.entry("del", tuple_orig=flow)
    except NetlinkError as err:
        if err.code != errno.ENOENT:  # it has ended by itself meanwhile
            raise
        return 0
    return 1
