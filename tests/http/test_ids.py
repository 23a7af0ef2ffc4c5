"""Ids and cursors: strict, and the same way back."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsule.errors import InvalidRequest
from capsule.http import cursors, ids
from capsule.model import Position

MOMENTS = st.datetimes(datetime(1970, 1, 1), datetime(6536, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@given(st.uuids())
def test_a_sandbox_id_has_two_spellings(value):
    """Ours and the 32 digits; both come back as the same UUID."""
    assert ids.parse_sandbox_id(ids.sandbox_id(value)) == value
    assert ids.parse_sandbox_id(value.hex) == value
    assert ids.parse_host_id(ids.host_id(value)) == value


@given(
    st.text()
    | st.uuids().map(str)
    | st.uuids().map(lambda value: f"sb-{value}\n")
    | st.uuids().map(lambda v: f"sb-{v.hex}")
)
def test_no_other_text_is_an_id(text):
    """Whatever is taken is one of the two spellings."""
    try:
        value = ids.parse_sandbox_id(text)
    except InvalidRequest:
        return
    assert text in {f"sb-{value}", value.hex}


@given(MOMENTS, st.uuids())
def test_a_cursor_keeps_every_microsecond(moment, value):
    """Trap 20: a cursor coarser than the column drops rows."""
    position = Position(moment, value)
    assert cursors.parse_position(cursors.encode_position(position)) == position


@given(
    st.text(st.sampled_from("abcXYZ019-_=+/ \n"), max_size=40)
    | st.binary(min_size=24, max_size=24).map(lambda raw: cursors.urlsafe_b64encode(raw).decode())
)
def test_a_cursor_has_one_spelling(text):
    """Whatever is taken is what we would have written."""
    try:
        position = cursors.parse_position(text)
    except InvalidRequest:
        return
    assert cursors.encode_position(position) == text


@given(st.integers(0, 2**64))
def test_pid_cursors(pid):
    """They come back, and no other list's cursor passes for one."""
    assert cursors.parse_pid(cursors.encode_pid(pid)) == pid
    with pytest.raises(InvalidRequest):
        cursors.parse_pid(cursors.encode_position(Position(datetime.now(UTC), UUID(int=1))))
