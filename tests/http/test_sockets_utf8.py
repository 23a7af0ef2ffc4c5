"""Cutting output into characters: nothing lost, nothing split, whatever the pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsule.http.sockets.utf8 import MAX_PIECES, Utf8Cutter


def cut(pieces):
    cutter = Utf8Cutter()
    found = [one for piece in pieces for one in cutter.feed(piece)]
    return [*found, *cutter.end()]


def joined(found):
    return b"".join(one.encode() if isinstance(one, str) else one for one in found)


def split(data, places):
    places = sorted({place % (len(data) + 1) for place in places})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


PLACES = st.lists(st.integers(0, 10_000), max_size=40)


@given(st.text(max_size=200), PLACES)
def test_text_is_text_however_it_is_split(text, places):
    """No piece is bytes, none is empty, and together they are the text."""
    found = cut(split(text.encode(), places))
    assert all(isinstance(one, str) and one for one in found)
    assert "".join(found) == text


@given(st.lists(st.one_of(st.binary(max_size=8), st.text(max_size=8).map(str.encode)), max_size=30), PLACES)
def test_any_bytes_come_back_whole(parts, places):
    """Mixed with what is no UTF-8: exactly the bytes, in order, no empty piece."""
    data = b"".join(parts)
    found = cut(split(data, places))
    assert joined(found) == data
    assert all(found)


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_every_position(character):
    """Cut between any two bytes, and byte by byte."""
    data = f"a{character}b".encode()
    for place in range(len(data) + 1):
        assert "".join(cut([data[:place], data[place:]])) == data.decode()
    assert "".join(cut([bytes((one,)) for one in data])) == data.decode()


@pytest.mark.parametrize(
    "wrong",
    [b"\xff", b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf8", b"\x80", b"\xe2\x28"],
)
def test_what_is_no_utf8(wrong):
    """Bytes at once, not held back for a rest that cannot make them right; what follows is text again."""
    cutter = Utf8Cutter()
    assert joined(cutter.feed(wrong)) == wrong
    assert cutter.feed(b"a") == ["a"]


def test_an_unfinished_character_waits_and_comes_at_the_end():
    """Its rest may never come."""
    cutter = Utf8Cutter()
    assert cutter.feed(b"a\xf0\x9f\x98") == ["a"]
    assert cutter.feed(b"") == []
    assert cutter.end() == [b"\xf0\x9f\x98"]
    assert cutter.end() == []


def test_binary_is_not_cut_to_pieces():
    """A few for each chunk, not one for each byte."""
    data = bytes(range(256)) * 256
    cutter = Utf8Cutter()
    found = cutter.feed(data)
    assert len(found) <= MAX_PIECES + 2
    assert joined([*found, *cutter.end()]) == data
