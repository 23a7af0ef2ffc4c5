from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsule.errors import InvalidRequest
from capsule.hosts.addresses import parse_address


@pytest.mark.parametrize(
    ("claimed", "stored"),
    [
        ("192.0.2.7:7443", "192.0.2.7:7443"),
        ("192.0.2.7:07443", "192.0.2.7:7443"),
        ("[2001:DB8:0::1]:7443", "[2001:db8::1]:7443"),
        ("[::ffff:192.0.2.7]:7443", "192.0.2.7:7443"),
        ("Agent.Example.:7443", "agent.example:7443"),
        ("agent-1:1", "agent-1:1"),
        ("127.0.0.1:7443", "127.0.0.1:7443"),
        ("[::1]:7443", "[::1]:7443"),
        ("10.0.0.7:7443", "10.0.0.7:7443"),
    ],
)
def test_every_spelling_of_an_address_is_stored_as_one(claimed, stored):
    """The database's unique index compares text: only one text per address keeps two hosts from sharing it."""
    assert parse_address(claimed).text == stored
    assert parse_address(stored).text == stored


@pytest.mark.parametrize(
    "address",
    [
        "",
        "192.0.2.7",
        "192.0.2.7:0",
        "192.0.2.7:65536",
        "192.0.2.07:1",
        "127.1:1",
        "2130706433:1",
        "0x7f000001:1",
        "a.0x7f:1",
        "0.0.0.0:1",
        "[::]:1",
        "[fe80::1%eth0]:1",
        "224.0.0.1:1",
        "[ff02::1]:1",
        "169.254.169.254:80",
        "[::ffff:169.254.169.254]:80",
        "[fe80::1]:1",
        "255.255.255.255:1",
        "240.0.0.1:1",
        "::1:1",
        "[::1:1",
        "a..b:1",
        "-a:1",
        "a_b:1",
        "h\N{SNOWMAN}:1",
        "a/b:1",
        "a@b:1",
        f"{'a' * 64}:1",
        f"{'a.' * 127}abc:1",
    ],
)
def test_what_is_no_address_is_refused(address):
    """Numbers in disguise, wildcards and anything that is neither an IP address nor a host name."""
    with pytest.raises(InvalidRequest, match="address"):
        parse_address(address)


@given(st.text(max_size=60))
def test_any_text_is_canonical_or_refused(text):
    """No input breaks the parser, and what it gives back it gives back again."""
    try:
        parsed = parse_address(text)
    except InvalidRequest:
        return
    assert parse_address(parsed.text) == parsed
