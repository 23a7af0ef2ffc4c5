"""Where a host says that it can be dialled, and where it listens."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.enrol import address
from agent.enrol.address import choose_address, join_address, listen_at, routed_address, split_address, split_url
from agent.enrol.errors import AddressUnusable, UrlInvalid

URL = "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("http://capsule.example", ("capsule.example", 80)),
        ("https://capsule.example/base", ("capsule.example", 443)),
        ("https://[2001:db8::1]:8443/", ("2001:db8::1", 8443)),
    ],
)
def test_urls(url, where):
    assert split_url(url) == where


@pytest.mark.parametrize(
    "url",
    [
        "",
        "capsule.example",
        "ftp://a",
        "http://",
        "http://:80",
        "http://a:b",
        "http://a:99999",
        "http://u:p@a",
        "http://a?b",
        "http://a#b",
        "http://a b",
        "http://[::1",
        "htok-1",
    ],
)
def test_what_is_no_url_is_refused_in_words(url):
    with pytest.raises(UrlInvalid, match="URL"):
        split_url(url)


@pytest.mark.parametrize("text", ["", "a", ":1", "a:", "a:0", "a:65536", "::1:80", "[a]:1", "[::1]", "a:٣", "a:-1"])
def test_what_is_no_address_is_refused_in_words(text):
    with pytest.raises(AddressUnusable, match="host:port"):
        split_address(text)


@given(st.text(max_size=30))
def test_no_text_breaks_the_parsers(text):
    """Each is taken apart and put together again, or refused."""
    try:
        host, port = split_address(text)
    except AddressUnusable:
        pass
    else:
        assert split_address(join_address(host, port)) == (host, port)
    with contextlib.suppress(UrlInvalid):
        split_url(text)


def test_the_default_is_the_address_on_the_route(monkeypatch):
    """A control plane on loopback dials loopback; what we are told to be bound to is not guessed at."""
    assert choose_address(URL, "", "127.0.0.1", 7443) == "127.0.0.1:7443"
    asked = []
    monkeypatch.setattr(address, "routed_address", lambda *where: asked.append(where) or "192.0.2.7")
    assert choose_address("https://a.example", "", "127.0.0.1", 7443) == "192.0.2.7:7443"
    assert choose_address("https://a.example", "", "0.0.0.0", 1) == "192.0.2.7:1"
    assert asked == [("a.example", 443)] * 2
    assert choose_address("https://a.example", "", "2001:db8::7", 7443) == "[2001:db8::7]:7443"
    assert len(asked) == 2
    with pytest.raises(AddressUnusable, match="BIND_PORT"):
        choose_address("https://a.example", "", "127.0.0.1", 0)


def test_no_route(monkeypatch):
    """It says what to do."""

    class Socket(address.socket.socket):
        def connect(self, _where):
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(address.socket, "socket", Socket)
    with pytest.raises(AddressUnusable, match="--address"):
        routed_address("127.0.0.1", 80)


def test_an_address_that_nobody_would_listen_on_is_refused():
    """Unless it is said where to listen instead."""
    assert choose_address(URL, "127.0.0.1:9", "127.0.0.1", 7443) == "127.0.0.1:9"
    for foreign in ("192.0.2.7:7443", "host.example:7443"):
        with pytest.raises(AddressUnusable, match="BIND_HOST"):
            choose_address(URL, foreign, "127.0.0.1", 7443)
        assert choose_address(URL, foreign, "0.0.0.0", 7443) == foreign


@pytest.mark.parametrize(
    ("bind_host", "joined", "where"),
    [
        ("127.0.0.1", "", ("127.0.0.1", 7443)),
        ("127.0.0.1", "192.0.2.7:9", ("192.0.2.7", 9)),
        ("localhost", "[2001:db8::7]:9", ("2001:db8::7", 9)),
        ("127.0.0.1", "127.0.0.1:9", ("127.0.0.1", 7443)),
        ("0.0.0.0", "host.example:9", ("0.0.0.0", 7443)),
        ("10.0.0.1", "192.0.2.7:9", ("10.0.0.1", 7443)),
    ],
)
def test_where_it_listens(bind_host, joined, where):
    """What was configured counts, except loopback, which nobody else can dial."""
    assert listen_at(bind_host, 7443, joined) == where
