"""Whose pages may connect."""

from __future__ import annotations

import pytest

from agent.actor.settings import SettingsError
from capsule.config import load
from capsule.http.sockets.origins import OriginRule

VALUES = {"CAPSULE_DATABASE_URL": "postgresql://", "CAPSULE_SECRET_KEY": "s" * 32}


def rule(**more):
    settings = load(VALUES | more)
    return OriginRule.of(settings.origins, same_host=not settings.public_url)


def test_no_origin_is_no_browser():
    """Command lines and libraries send none."""
    assert rule(CAPSULE_PUBLIC_URL="https://capsule.example").admits([], "whatever")


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [
        ("https://capsule.example", True),
        ("https://CAPSULE.example:443", True),
        ("https://app.example:8443", True),
        ("http://capsule.example", False),
        ("https://capsule.example.evil.example", False),
        ("https://evil.example", False),
        ("https://capsule.example@evil.example", False),
        ("https://capsule.example:8443", False),
        ("null", False),
        ("", False),
        ("https://[", False),
        ("https://capsule.example:99999", False),
        ("file://", False),
    ],
)
def test_with_a_public_url(origin, admitted):
    """That one and those that are allowed; the Host header says nothing then."""
    asked = rule(CAPSULE_PUBLIC_URL="https://capsule.example/", CAPSULE_ALLOWED_ORIGINS="https://app.example:8443")
    assert asked.admits([origin], "evil.example") is admitted


@pytest.mark.parametrize(
    ("origin", "host", "admitted"),
    [
        ("http://localhost:8080", "x", True),
        ("http://127.0.0.1:8080", "x", True),
        ("http://[::1]:8080", "x", True),
        ("http://localhost:3000", "127.0.0.1:8080", False),
        ("http://box.lan:8080", "box.lan:8080", True),
        ("https://box.lan", "box.lan", True),
        ("http://box.lan", "box.lan:8080", False),
        ("http://evil.example", "box.lan", False),
        ("http://box.lan", "", False),
        ("http://box.lan", "box.lan/x", False),
    ],
)
def test_without_a_public_url(origin, host, admitted):
    """Where we listen, and whatever name the request was sent to."""
    assert rule(CAPSULE_BIND="127.0.0.1:8080").admits([origin], host) is admitted


def test_two_origins_are_none():
    """A browser sends one."""
    assert not rule().admits(["http://localhost:8080", "http://localhost:8080"], "localhost:8080")


@pytest.mark.parametrize(
    "text",
    [
        "app.example",
        "https://app.example/",
        "https://app.example/x",
        "*",
        "ftp://a",
        "https://",
        "https://a:b",
        "https://u@a",
    ],
)
def test_settings_are_checked(text):
    """The variable is named; the server does not start."""
    with pytest.raises(SettingsError, match="CAPSULE_ALLOWED_ORIGINS"):
        load({**VALUES, "CAPSULE_ALLOWED_ORIGINS": f"https://good.example, {text}"})
