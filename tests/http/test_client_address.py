"""Whose address a request comes from: what anybody can write into a header is not believed."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsule.http.client_address import ClientAddresses

PROXIES = ClientAddresses([ip_network("10.0.0.0/8"), ip_network("fd00::/8")])


def address(peer, *lines, proxies=PROXIES):
    headers = [(b"x-forwarded-for", line.encode("latin-1")) for line in lines]
    return proxies.of({"client": None if peer is None else (peer, 1234), "headers": headers})


@pytest.mark.parametrize(
    ("peer", "lines", "client"),
    [
        ("192.0.2.7", (), "192.0.2.7"),
        ("192.0.2.7", ("198.51.100.1",), "192.0.2.7"),
        ("10.0.0.1", (), "10.0.0.1"),
        ("10.0.0.1", ("198.51.100.1",), "198.51.100.1"),
        ("10.0.0.1", ("203.0.113.9, 198.51.100.1",), "198.51.100.1"),
        ("10.0.0.1", ("203.0.113.9, 198.51.100.1, 10.0.0.2",), "198.51.100.1"),
        ("10.0.0.1", ("203.0.113.9", "198.51.100.1, 10.0.0.2"), "198.51.100.1"),
        ("10.0.0.1", ("10.0.0.3, 10.0.0.2",), "10.0.0.3"),
        ("10.0.0.1", ("198.51.100.1:4711",), "198.51.100.1"),
        ("10.0.0.1", ("[2001:db8::1]:4711",), "2001:db8::1"),
        ("fd00::1", ("2001:DB8:0::1",), "2001:db8::1"),
        ("::ffff:10.0.0.1", ("::ffff:198.51.100.1",), "198.51.100.1"),
        ("10.0.0.1", ("203.0.113.9, rubbish, 10.0.0.2",), "10.0.0.2"),
        ("10.0.0.1", ("",), "10.0.0.1"),
        ("10.0.0.1", (", ".join(["203.0.113.9", *["10.0.0.2"] * 40]),), "10.0.0.2"),
        (None, (), "unknown"),
        ("a socket's path", ("198.51.100.1",), "unknown"),
    ],
)
def test_the_nearest_hop_that_is_no_trusted_proxy(peer, lines, client):
    """Whatever stands left of it anybody may have written."""
    assert address(peer, *lines) == client


def test_nobody_is_trusted_unless_told():
    """The header is not looked at."""
    assert address("10.0.0.1", "198.51.100.1", proxies=ClientAddresses()) == "10.0.0.1"


@given(st.lists(st.text(st.characters(max_codepoint=255), max_size=60), max_size=4))
def test_any_header_gives_an_address(lines):
    """Of bounded length, never an error."""
    assert len(address("10.0.0.1", *lines)) <= 45
