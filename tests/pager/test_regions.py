"""The handshake's JSON is a hostile process's word."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.pager.regions import MAX_REGIONS, HandshakeRefused, Region, RegionMap, parse_handshake

MEMORY = 1 << 20
PAGE = 4096


def encode(*regions, **more):
    return json.dumps(
        [{"base_host_virt_addr": a, "size": s, "offset": o, "page_size": PAGE, **more} for a, s, o in regions]
    ).encode()


def test_firecrackers_message_is_understood():
    """Also with the older field, whose name says KiB and whose value is bytes, and with fields of the future."""
    text = b'[{"base_host_virt_addr":140737488351232,"size":1048576,"offset":0,"page_size":4096,"page_size_kib":4096}]'
    assert parse_handshake(text, memory_bytes=MEMORY) == (Region(140737488351232, MEMORY, 0),)
    old = b'[{"base_host_virt_addr":4096,"size":4096,"offset":4096,"page_size_kib":4096,"new":[1]}]'
    assert parse_handshake(old, memory_bytes=MEMORY) == (Region(4096, 4096, 4096),)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'[{"size":4096}]',
        encode((4096, 4096, 0.5)),
        encode((4097, 4096, 0)),
        encode((4096, 4095, 0)),
        encode((4096, 4096, 1)),
        encode((0, 4096, 0)),
        encode((-4096, 4096, 0)),
        encode((4096, 0, 0)),
        encode((4096, -4096, 4096)),
        encode((4096, 4096, -4096)),
        encode((2**64, 4096, 0)),
        encode((2**56, 4096, 0)),
        encode((4096, MEMORY + PAGE, 0)),
        encode((4096, PAGE, MEMORY)),
        encode((4096, 8192, 0), (8192, 4096, 8192)),
        encode((4096, 8192, 0), (65536, 4096, 4096)),
        encode(*((4096 * (i + 1), 4096, 4096 * i) for i in range(MAX_REGIONS + 1))),
        encode((4096, 4096, 0), page_size=2 << 20),
        b"[" * 100_000,
    ],
)
def test_what_is_no_handshake_for_this_memory_is_refused(message):
    """Rubbish, pages that are none, regions that overlap, lie outside the snapshot or beyond all addresses."""
    with pytest.raises(HandshakeRefused):
        parse_handshake(message, memory_bytes=MEMORY)


@given(st.binary(max_size=300))
def test_no_bytes_make_anything_but_regions_or_a_refusal(message):
    with suppress(HandshakeRefused):
        parse_handshake(message, memory_bytes=MEMORY)


@st.composite
def layouts(draw):
    """Disjoint regions: sizes, gaps between their addresses, the offsets in another order."""
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
    order = draw(st.permutations(range(len(sizes))))
    offsets, at = {}, 0
    for index in order:
        offsets[index] = at * PAGE
        at += sizes[index]
    regions, address = [], draw(st.integers(1, 100))
    for index, size in enumerate(sizes):
        regions.append((address * PAGE, size * PAGE, offsets[index]))
        address += size + draw(st.integers(0, 5))
    return regions


@given(layouts(), st.integers(0, 150), st.integers(0, 150))
def test_addresses_are_found_as_in_a_table_of_all_of_them(layout, one, other):
    """`find` and `clip` against one entry per address."""
    regions = parse_handshake(encode(*layout), memory_bytes=MEMORY)
    table = {a + i * PAGE: o + i * PAGE for a, s, o in layout for i in range(s // PAGE)}
    found = RegionMap(regions)
    for page in range(150):
        region = found.find(page * PAGE + 5)
        assert (page * PAGE in table) == (region is not None)
        if region is not None:
            assert region.offset + page * PAGE - region.address == table[page * PAGE]
            assert found.at_offset(table[page * PAGE]) == region
    start, end = sorted((one * PAGE, other * PAGE))
    clipped = {o + i for o, length in found.clip(start, end) for i in range(0, length, PAGE)}
    assert clipped == {offset for address, offset in table.items() if start <= address < end}
