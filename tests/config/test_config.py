from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.actor.settings import SettingsError
from capsule.config import load, split_address

GOOD = {"CAPSULE_DATABASE_URL": "postgresql:///capsule", "CAPSULE_SECRET_KEY": "k" * 32}


def test_two_variables_are_enough():
    """Everything else has a default, and the URL follows the address we listen on."""
    settings = load({**GOOD, "PATH": "/bin"})
    assert settings.bind_address == ("127.0.0.1", 8080)
    assert settings.url == "http://127.0.0.1:8080"
    assert load({**GOOD, "CAPSULE_PUBLIC_URL": "https://a.example/"}).url == "https://a.example"


@pytest.mark.parametrize("key", [None, "", "k" * 31])
def test_a_short_secret_key_is_refused_with_the_way_out(key):
    """The message names the variable and how to make a key."""
    values = {k: v for k, v in {**GOOD, "CAPSULE_SECRET_KEY": key}.items() if v is not None}
    with pytest.raises(SettingsError, match=r"CAPSULE_SECRET_KEY.*token_hex"):
        load(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BIND", "8080"),
        ("BIND", "::1:8080"),
        ("BIND", "localhost:http"),
        ("PUBLIC_URL", "capsule.example"),
        ("LOG_LEVEL", "loud"),
        ("CREATE_TIMEOUT", "-1"),
        ("CREATE_TIMEOUT", "soon"),
        ("HOST_TOKEN_LIFETIME", "59"),
        ("HOST_TOKEN_LIFETIME", "1e30"),
        ("LOG_JSON", "perhaps"),
        ("TRUSTED_PROXIES", "proxy"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
        ("ARGON2_MEMORY_KIB", "7"),
        ("ARGON2_TIME_COST", "0"),
        ("PASSWORD_THREADS", "0"),
    ],
)
def test_a_value_that_does_not_fit_names_its_variable(name, value):
    with pytest.raises(SettingsError, match=f"CAPSULE_{name}"):
        load({**GOOD, f"CAPSULE_{name}": value})


@pytest.mark.parametrize(
    "url",
    ["localhost:6379", "http://h", "redis://", "redis://:secret@h:port", "redis://h:0", "unix://x", "redis://[::1"],
)
def test_an_address_that_is_not_rediss_is_refused(url):
    """At the start, and without a word of it: it may have a password."""
    with pytest.raises(SettingsError, match="CAPSULE_REDIS_URL") as caught:
        load({**GOOD, "CAPSULE_REDIS_URL": url})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://:secret@h:6379/0", "rediss://h", "unix:///run/redis.sock?db=1"])
def test_addresses_of_redis(url):
    assert load({**GOOD, "CAPSULE_REDIS_URL": url}).redis_url == url


def test_secrets_stay_out_of_repr():
    """A traceback that shows the settings shows neither the key nor the database's password."""
    settings = load({**GOOD, "CAPSULE_DATABASE_URL": "postgresql://u:hunter2@h/d"})
    assert "hunter2" not in repr(settings)
    assert "kkkk" not in repr(settings)


def test_derived_keys_differ_by_purpose_and_by_secret():
    """No key of one purpose or installation opens anything of another; the same inputs give the same key."""
    one, two = load(GOOD), load({**GOOD, "CAPSULE_SECRET_KEY": "x" * 32})
    keys = {one.derive_key("a"), one.derive_key("b"), two.derive_key("a")}
    assert len(keys) == 3
    assert all(len(key) == 32 for key in keys)
    assert one.derive_key("a") == load(GOOD).derive_key("a")


@given(st.text(max_size=40))
def test_no_text_breaks_the_address_parser(text):
    """Any text is either split, or refused with ValueError."""
    try:
        host, port = split_address(text)
    except ValueError:
        return
    assert host
    assert 0 <= port < 65536


def test_addresses():
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("agent.example:7443") == ("agent.example", 7443)
