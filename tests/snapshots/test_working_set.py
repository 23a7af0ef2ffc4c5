"""Working sets: which pages are brought before they are asked for."""

from __future__ import annotations

import errno
import hashlib
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.snapshots import working_set
from agent.snapshots.errors import HostDiskFull
from agent.snapshots.header import PAGE
from agent.snapshots.working_set import WorkingSet, combine, decode
from tests.snapshots.disk import Disk, Killed

touches = st.sets(st.integers(0, 30), max_size=20)


def ranges_of(pages):
    return [(number * PAGE, PAGE) for number in pages]


def pages_of(ranges):
    return {offset // PAGE + each for offset, length in ranges for each in range(length // PAGE)}


@given(st.lists(touches, min_size=1, max_size=7))
def test_what_two_of_the_last_three_runs_touched(runs):
    """After any number of runs, against sets of pages; the only run counts alone."""
    current = None
    for run in runs:
        current = decode(combine(current, ranges_of(run)).encode())
    last = runs[-3:]
    expected = last[0] if len(last) == 1 else {n for n in range(31) if sum(n in run for run in last) >= 2}
    assert pages_of(current.ranges()) == expected
    offsets = [offset for offset, _ in current.ranges()]
    assert offsets == sorted(offsets)


def test_it_does_not_grow_without_end():
    """Runs that touch other pages each time leave nothing; a page that is always touched stays."""
    current = None
    for number in range(50):
        current = combine(current, [(0, PAGE), ((number + 1) * 10 * PAGE, 5 * PAGE)])
    assert current.ranges() == ((0, PAGE),)
    assert len(current.encode()) < 300


def test_overlapping_and_touching_ranges_are_one():
    """As a fault recorder gives them: in any order, several times."""
    current = combine(
        None, [(8 * PAGE, 2 * PAGE), (0, PAGE), (PAGE, PAGE), (9 * PAGE, 3 * PAGE), (0, PAGE), (50 * PAGE, 0)]
    )
    assert current.ranges() == ((0, 2 * PAGE), (8 * PAGE, 4 * PAGE))
    with pytest.raises(ValueError, match="no part of a memory"):
        combine(None, [(1, PAGE)])


def test_its_size_is_bounded(monkeypatch):
    """The largest ranges of a run are kept."""
    monkeypatch.setattr(working_set, "MAX_RANGES", 3)
    ranges = [(number * 10 * PAGE, (number % 5 + 1) * PAGE) for number in range(10)]
    assert sorted(length // PAGE for _, length in combine(None, ranges).ranges()) == [4, 5, 5]


working_sets = st.lists(touches, min_size=1, max_size=3).map(
    lambda runs: WorkingSet(tuple(combine(None, ranges_of(run)).touched[0] for run in runs))
)


@given(working_sets, st.data())
def test_a_damaged_one_is_none(current, data):
    """Any flipped bit, any cut, anything behind."""
    content = current.encode()
    assert decode(content) == current
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    harmed = bytearray(content)
    harmed[bit // 8] ^= 1 << bit % 8
    for each in (bytes(harmed), content[: bit // 8], content + b"\0", content[:-32] + bytes(32)):
        assert decode(each) is None


words = st.one_of(st.integers(0, 9).map(lambda each: each * PAGE), st.integers(0, (1 << 64) - 1), st.integers(0, 5))


@given(working_sets, st.lists(st.tuples(st.integers(0, 60), words), max_size=3), st.binary(max_size=30))
def test_any_bytes_with_a_right_checksum_are_valid_or_none(current, changes, tail):
    """What comes through is sorted, apart, of whole pages and has one encoding."""
    content = bytearray(current.encode()[:-32])
    for place, word in changes:
        position = place * 8 % (len(content) - 7)
        content[position : position + 8] = word.to_bytes(8, "little")
    for body in (bytes(content), bytes(content) + tail, tail):
        signed = body + hashlib.sha256(body).digest()
        found = decode(signed)
        if found is not None:
            assert found.encode() == signed
            found.ranges()


def test_a_count_that_lies_costs_no_memory():
    """2^60 ranges."""
    body = b"CAPSWSET" + struct.pack("<IIQ", 1, 1, 1 << 60)
    tracemalloc.start()
    try:
        assert decode(body + hashlib.sha256(body).digest()) is None
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_the_file_is_replaced_whole(tmp_path):
    """A full disk or a kill at any operation leaves the old one readable; the next write succeeds."""
    path = tmp_path / "working-set"
    assert working_set.read(path) is None
    old, new = combine(None, [(0, PAGE)]), combine(None, [(PAGE, PAGE)])
    with Disk() as disk:
        for number in range(1, 6):
            disk.recover()
            working_set.write(path, old)
            disk.fail_at(number)
            try:
                working_set.write(path, new)
            except HostDiskFull:
                assert (working_set.read(path), len(list(tmp_path.iterdir()))) == (old, 1)
            disk.recover()
            working_set.write(path, old)
            disk.kill_at(number)
            try:
                working_set.write(path, new)
            except Killed:
                assert working_set.read(path) == old
        disk.fail_at(1, errno.EIO)
    working_set.write(path, new)
    assert working_set.read(path) == new
    path.write_bytes(b"rubbish")
    assert working_set.read(path) is None
