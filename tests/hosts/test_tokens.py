from __future__ import annotations

import warnings
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import jwt
import pytest
from msgspec import structs

from capsule.config import Settings
from capsule.errors import Unauthorized
from capsule.hosts.tokens import (
    REFRESH_PREFIX,
    REGISTRATION_PREFIX,
    HostClaims,
    HostTokens,
    digest,
    is_well_formed,
    new_refresh_token,
    new_registration_token,
)

SETTINGS = Settings(database_url="postgresql:///x", secret_key="s" * 32)
NOW = datetime.now(UTC)


@pytest.fixture
def tokens():
    return HostTokens(SETTINGS)


def signed(key=None, *, algorithm="HS256", **changes):
    """A token like ours with some claims changed; None drops one."""
    claims = {"sub": str(uuid4()), "typ": "host", "epoch": 1, "iat": NOW, "exp": NOW + timedelta(days=1)}
    claims = {name: value for name, value in {**claims, **changes}.items() if value is not None}
    with warnings.catch_warnings(action="ignore"):  # our key is short for HS512
        return jwt.encode(claims, key or SETTINGS.derive_key("host-token"), algorithm)


def test_a_token_says_which_host_and_which_registration(tokens):
    host = uuid4()
    assert tokens.check(tokens.issue(host, 3)) == HostClaims(host, 3)


@pytest.mark.parametrize(
    ("given", "lifetime"), [({}, timedelta(days=7)), ({"host_token_lifetime": 60}, timedelta(seconds=60))]
)
def test_a_token_lives_seven_days_or_as_long_as_it_is_set(given, lifetime):
    tokens = HostTokens(structs.replace(SETTINGS, **given))
    now = datetime.now(UTC)
    old = tokens.issue(uuid4(), 1, now=now - lifetime - timedelta(seconds=1))
    with pytest.raises(Unauthorized, match="expired"):
        tokens.check(old)
    tokens.check(tokens.issue(uuid4(), 1, now=now - lifetime + timedelta(seconds=30)))


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a.b.c",
        "\N{SNOWMAN}",
        "x" * 5000,
        signed(b"k" * 32),
        signed(SETTINGS.derive_key("session")),
        signed(algorithm="HS512"),
        signed(typ="user"),
        signed(typ=None),
        signed(exp=None),
        signed(iat=None),
        signed(sub=None),
        signed(sub="host"),
        signed(epoch=None),
        signed(epoch="1"),
        signed(epoch=True),
        jwt.encode({"sub": str(uuid4()), "typ": "host", "epoch": 1}, None, "none"),
    ],
)
def test_every_other_token_is_refused(tokens, token):
    """Forged, of another key, algorithm or kind, or without a claim: always the one typed refusal."""
    with pytest.raises(Unauthorized):
        tokens.check(token)


def test_random_tokens_have_their_form_and_never_repeat():
    """256 bits behind a prefix that says what it is; the digest is what a database holds."""
    for make, prefix in ((new_registration_token, REGISTRATION_PREFIX), (new_refresh_token, REFRESH_PREFIX)):
        token = make()
        assert is_well_formed(token, prefix)
        assert token != make()
        assert len(digest(token)) == 32
    assert not is_well_formed(new_refresh_token(), REGISTRATION_PREFIX)
    assert not is_well_formed(new_refresh_token() + "0", REFRESH_PREFIX)
    assert not is_well_formed("", REFRESH_PREFIX)
