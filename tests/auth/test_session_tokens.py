"""What is remembered of a token that was seen before."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from capsule.auth import sessions
from capsule.auth.sessions import LIFETIME, SessionHolder, SessionTokens
from capsule.config import Settings
from capsule.errors import Unauthorized


@pytest.fixture
def tokens():
    return SessionTokens(Settings(database_url="postgresql://", secret_key="s" * 32))


def issued(tokens, at=None):
    holder = SessionHolder(user_id=uuid4(), email="a@example.org", name="A", is_admin=False, team_id=None, role=None)
    return tokens.issue(holder, at or datetime.now(UTC))


def test_a_remembered_token_ends_when_it_says(tokens, monkeypatch):
    """Its signature is not looked at again, its end is."""
    token = issued(tokens)
    claims = tokens.check(token)
    assert tokens.check(token) is claims

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + LIFETIME + timedelta(seconds=1)

    monkeypatch.setattr(sessions, "datetime", Later)
    with pytest.raises(Unauthorized, match="expired"):
        tokens.check(token)


def test_what_is_not_sound_is_refused_each_time_and_takes_no_room(tokens):
    """Also right after the sound one that it was made from."""
    token = issued(tokens)
    tokens.check(token)
    head, body, signature = token.split(".")
    for forged in (f"{head}.{body}.{signature[::-1]}", f"{head}.{body}.", f"{head}.{body}x.{signature}", ""):
        for _ in range(2):
            with pytest.raises(Unauthorized):
                tokens.check(forged)
    expired = issued(tokens, datetime.now(UTC) - LIFETIME)
    for _ in range(2):
        with pytest.raises(Unauthorized, match="expired"):
            tokens.check(expired)
    assert tokens._sound.cache_info().currsize == 1
    assert tokens._sound.cache_info().maxsize == sessions.REMEMBERED
