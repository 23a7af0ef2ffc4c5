"""Which addresses of a VMM are which bytes of the guest's memory, as its handshake says.

The handshake is Firecracker's (docs/snapshotting/handling-page-faults-on-snapshot-resume.md there): one message, a
JSON array of regions. Everything in it is the VMM's word and checked here; a lie costs the VMM its own memory.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import msgspec

from agent.pager.abi import PAGE

MAX_REGIONS = 64
MAX_HANDSHAKE_BYTES = 32 * 1024
_MAX_ADDRESS = 2**56
"""Above every user address of today's machines."""


class HandshakeRefused(Exception):  # noqa: N818 - says what happened
    """What the VMM sent is no handshake for this snapshot."""


class Region(msgspec.Struct, frozen=True):
    """`size` bytes at `address` of the VMM are the guest's memory from `offset` on; whole pages."""

    address: int
    size: int
    offset: int


class _Mapping(msgspec.Struct, frozen=True):
    """One element of the message. Other fields are ignored: a newer VMM may send more."""

    base_host_virt_addr: int
    size: int
    offset: int
    page_size: int | None = None
    page_size_kib: int | None = None
    """Bytes too, whatever its name says; older VMMs send only this one."""


_decoder = msgspec.json.Decoder(list[_Mapping])


def parse_handshake(message: bytes, *, memory_bytes: int) -> tuple[Region, ...]:
    """Return the regions by address. Raises HandshakeRefused."""
    try:
        mappings = _decoder.decode(message)
    except msgspec.MsgspecError as err:
        raise HandshakeRefused(f"the VMM's handshake cannot be read: {err}") from err
    if not 1 <= len(mappings) <= MAX_REGIONS:
        raise HandshakeRefused(f"the VMM's handshake names {len(mappings)} regions, between 1 and {MAX_REGIONS} may be")
    for mapping in mappings:
        _check(mapping, memory_bytes)
    regions = [Region(mapping.base_host_virt_addr, mapping.size, mapping.offset) for mapping in mappings]
    for spans in (
        sorted((region.offset, region.size) for region in regions),
        sorted((region.address, region.size) for region in regions),
    ):
        if any(start + size > following for (start, size), (following, _) in pairwise(spans)):
            raise HandshakeRefused("the regions of the VMM's handshake overlap")
    return tuple(sorted(regions, key=lambda region: region.address))


def _check(mapping: _Mapping, memory_bytes: int) -> None:
    address, size, offset = mapping.base_host_virt_addr, mapping.size, mapping.offset
    page_size = mapping.page_size if mapping.page_size is not None else mapping.page_size_kib
    if page_size not in {None, PAGE, PAGE // 1024}:
        raise HandshakeRefused(f"the VMM has pages of {page_size} bytes; {PAGE} are supported")
    if address <= 0 or size <= 0 or offset < 0 or (address | size | offset) % PAGE or address + size > _MAX_ADDRESS:
        raise HandshakeRefused(
            f"the VMM's handshake has an impossible region: {size} bytes at {address}, from {offset}"
        )
    if offset + size > memory_bytes:
        raise HandshakeRefused(
            f"the VMM has memory up to byte {offset + size}, the snapshot ends at {memory_bytes}: it is another VM's"
        )


class RegionMap:
    """Looks addresses up."""

    def __init__(self, regions: tuple[Region, ...]) -> None:
        """`regions`: by address, disjoint."""
        self.regions = regions
        self._starts = [region.address for region in regions]

    def find(self, address: int) -> Region | None:
        """The region that an address lies in; None if it lies in none."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        region = self.regions[index]
        return region if address < region.address + region.size else None

    def at_offset(self, offset: int) -> Region:
        """The region that an offset in the guest's memory lies in. It must lie in one."""
        return next(region for region in self.regions if region.offset <= offset < region.offset + region.size)

    def clip(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of the guest's memory, (offset, length), that the addresses from `start` to `end` are."""
        found: list[tuple[int, int]] = []
        for region in self.regions:
            low, high = max(start, region.address), min(end, region.address + region.size)
            if low < high:
                found.append((region.offset + low - region.address, high - low))
        return found
