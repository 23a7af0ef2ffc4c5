"""The header of a memory: against plain arrays, and its file against every kind of harm."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
from array import array
from unittest.mock import patch
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.snapshots import columns, header_format
from agent.snapshots.errors import HeaderDamaged, MemoryTooFragmented
from agent.snapshots.header import NIL, PAGE, Header, Run
from agent.snapshots.merge import overlay

BUILDS = [UUID(int=number, version=4) for number in range(1, 5)]
FIXED = header_format.FIXED

pages = st.integers(1, 40)
origin = st.tuples(st.sampled_from([NIL, *BUILDS]), st.integers(0, 30))
"""Where a page lies: build and page of its data."""


def runs_of(model):
    """One run per page; a model has an origin for every page."""
    for number, (build, data) in enumerate(model):
        yield Run(number * PAGE, PAGE, build, 0 if build == NIL else data * PAGE)


def model_of(header):
    found = []
    for run in header.runs:
        step = 0 if run.build == NIL else 1
        found += [(run.build, run.data_offset // PAGE + each * step) for each in range(run.length // PAGE)]
    return found


def normal(model):
    return [(build, 0 if build == NIL else data) for build, data in model]


def made_of(model, **fixed):
    values = {"memory_bytes": len(model) * PAGE, "generation": 1, "build": BUILDS[0], **fixed}
    return Header.of(runs=runs_of(model), **values)


@st.composite
def headers(draw):
    model = draw(st.lists(origin, min_size=1, max_size=40))
    generation = draw(st.integers(1, (1 << 32) - 1))
    return made_of(model, generation=generation, parent=draw(st.sampled_from([NIL, BUILDS[1]])))


@given(st.lists(origin, min_size=1, max_size=40))
def test_runs_cover_the_memory_and_merge(model):
    """Page by page in, as few runs as possible out, the same pages."""
    header = made_of(model)
    assert model_of(header) == normal(model)
    for before, after in zip(header.runs, header.runs[1:], strict=False):
        assert before.offset + before.length == after.offset
        same = before.build == after.build
        assert not (same and (before.build == NIL or before.data_offset + before.length == after.data_offset))
    assert header.builds() == {build for build, _ in model} - {NIL}
    ends = {build: max(data + 1 for b, data in model if b == build) * PAGE for build in header.builds()}
    assert header.extents() == ends


@given(st.lists(origin, min_size=1, max_size=40), st.data())
def test_find_and_slices(model, data):
    """Any byte, any part of the memory, cut to measure."""
    header = made_of(model)
    offset = data.draw(st.integers(0, len(model) * PAGE - 1))
    length = data.draw(st.integers(0, len(model) * PAGE - offset))
    found = header.find(offset)
    assert found.offset == offset
    assert (found.build, found.data_offset // PAGE) == normal(model)[offset // PAGE]
    cut = list(header.slices(offset, length))
    assert sum(run.length for run in cut) == length
    position = offset
    for run in cut:
        assert run.offset == position
        for byte in (run.offset, run.offset + run.length - 1):
            build, number = normal(model)[byte // PAGE]
            place = 0 if build == NIL else number * PAGE + byte % PAGE
            assert (run.build, run.data_offset + (byte - run.offset if build != NIL else 0)) == (build, place)
        position += run.length


def test_outside_of_the_memory():
    """What lies outside is the caller's error, not an answer."""
    header = made_of([(BUILDS[0], 0)] * 2)
    for offset, length in ((-1, 1), (0, 2 * PAGE + 1), (2 * PAGE + 1, 0), (PAGE, -1)):
        with pytest.raises(ValueError, match="outside"):
            list(header.slices(offset, length))
    for offset in (-1, 2 * PAGE):
        with pytest.raises(ValueError, match="outside"):
            header.find(offset)


@given(st.one_of(st.none(), st.lists(origin, min_size=12, max_size=12)), st.dictionaries(st.integers(0, 11), origin))
def test_overlay_is_what_writing_over_would_be(below, changes):
    """The parent's pages with some replaced, zeroed ones among them; with no parent the rest is zeros."""
    parent = None if below is None else made_of(below, generation=3)
    expected = list(below or [(NIL, 0)] * 12)
    for number, place in changes.items():
        expected[number] = place
    changed = [next(runs_of([changes[number]]))._replace(offset=number * PAGE) for number in sorted(changes)]
    header = overlay(parent, changed, memory_bytes=12 * PAGE, build=BUILDS[3])
    assert header == made_of(
        expected,
        generation=1 if below is None else 4,
        build=BUILDS[3],
        parent=NIL if below is None else BUILDS[0],
    )
    assert Header.decode(header.encode(), name="x") == header


@pytest.mark.parametrize(
    "changed",
    [
        [Run(PAGE, PAGE, BUILDS[0], 0), Run(0, PAGE, BUILDS[0], PAGE)],
        [Run(0, 2 * PAGE, BUILDS[0], 0), Run(PAGE, PAGE, BUILDS[0], 0)],
        [Run(3 * PAGE, 2 * PAGE, BUILDS[0], 0)],
        [Run(-PAGE, PAGE, BUILDS[0], 0)],
        [Run(0, 0, BUILDS[0], 0)],
        [Run(0, 100, BUILDS[0], 0)],
        [Run(0, PAGE, BUILDS[0], 1)],
        [Run(0, PAGE, BUILDS[0], -PAGE)],
        [Run(0, PAGE, BUILDS[0], 1 << 42)],
        [Run(0, PAGE, NIL, PAGE)],
    ],
)
def test_impossible_changes_are_refused(changed):
    """Unsorted, overlapping, outside, not whole pages, no place in a build."""
    with pytest.raises(ValueError, match="Run"):
        overlay(None, changed, memory_bytes=4 * PAGE, build=BUILDS[0])


def test_impossible_headers_are_refused():
    """Gaps, a cut end, another memory's parent, sizes and ids that cannot be."""
    with pytest.raises(ValueError, match="no run covers"):
        Header.of(memory_bytes=2 * PAGE, generation=1, build=BUILDS[0], runs=[Run(PAGE, PAGE, NIL, 0)])
    with pytest.raises(ValueError, match="cover 4096 bytes"):
        Header.of(memory_bytes=2 * PAGE, generation=1, build=BUILDS[0], runs=[Run(0, PAGE, NIL, 0)])
    with pytest.raises(ValueError, match="cannot become"):
        overlay(made_of([(NIL, 0)]), [], memory_bytes=2 * PAGE, build=BUILDS[1])
    with pytest.raises(ValueError, match="build"):
        overlay(made_of([(NIL, 0)]), [], memory_bytes=PAGE, build=BUILDS[0])
    for values in ({"generation": 0}, {"generation": 1 << 32}, {"build": NIL}):
        with pytest.raises(ValueError, match="impossible"):
            made_of([(NIL, 0)], **values)
    with pytest.raises(ValueError, match="impossible"):
        overlay(None, [], memory_bytes=PAGE + 1, build=BUILDS[0])


def test_too_many_runs_are_a_typed_error():
    """A guest can fragment its memory on purpose; the header has a limit."""
    with patch.object(columns, "MAX_RUNS", 4), pytest.raises(MemoryTooFragmented):
        made_of([(BUILDS[0], each * 2) for each in range(5)])


def test_looking_up_is_a_binary_search():
    """A lookup among 2^16 runs reads some twenty of them."""

    class Counting:
        def __init__(self, values):
            self.values, self.reads = values, 0

        def __len__(self):
            return len(self.values)

        def __getitem__(self, index):
            self.reads += 1
            return self.values[index]

    count = 1 << 16
    header = made_of([(BUILDS[0], 2 * each) for each in range(count)])
    assert len(header.runs) == count
    header.columns.starts = Counting(header.columns.starts)
    for number in (0, 1, count // 2, count - 1):
        header.columns.starts.reads = 0
        assert header.find(number * PAGE + 5).data_offset == number * 2 * PAGE + 5
        assert header.columns.starts.reads <= 17 + 4
        header.columns.starts.reads = 0
        assert len(list(header.slices(number * PAGE, min(16, count - number) * PAGE))) == min(16, count - number)
        assert header.columns.starts.reads <= 17 + 16 * 4 + 1


def test_merging_is_linear():
    """Twice the runs, twice the steps: counted, in the parent's runs and in the result's."""

    def steps(count):
        parent = made_of([(BUILDS[0], 2 * each) for each in range(count)])
        counted = 0

        class Counting(array):
            def __getitem__(self, index):
                nonlocal counted
                counted += 1
                return super().__getitem__(index)

        parent.columns.starts = Counting("Q", parent.columns.starts)
        changed = [Run(each * PAGE, PAGE, BUILDS[1], each * 2 * PAGE) for each in range(0, count, 3)]
        overlay(parent, changed, memory_bytes=count * PAGE, build=BUILDS[1])
        return counted

    assert steps(4000) <= 2 * steps(2000) + 20
    assert steps(4000) <= 10 * 4000


@given(headers())
def test_encoding_comes_back(header):
    """Decoding what was encoded is the same header, and encodes to the same bytes."""
    found = Header.decode(header.encode(), name="x")
    assert found == header
    assert (found.generation, found.build, found.parent) == (header.generation, header.build, header.parent)
    assert list(found.runs) == list(header.runs)
    assert found.encode() == header.encode()


@given(headers(), st.data())
def test_a_flipped_bit_is_refused(header, data):
    """Any bit of a valid file, also of its checksum: a typed error that names the file."""
    content = bytearray(header.encode())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    with pytest.raises(HeaderDamaged, match="some/file"):
        Header.decode(bytes(content), name="some/file")


@given(headers(), st.data())
def test_a_cut_file_is_refused(header, data):
    """Any beginning of a valid file, and a valid file with something behind it."""
    content = header.encode()
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    for harmed in (cut, content + data.draw(st.binary(min_size=1, max_size=50))):
        with pytest.raises(HeaderDamaged, match="some/file"):
            Header.decode(harmed, name="some/file")


def signed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def decoded(content: bytes) -> Header | None:
    """None: it was refused, by name."""
    try:
        return Header.decode(content, name="some/file")
    except HeaderDamaged as err:
        if str(err).startswith("some/file is damaged"):
            return None
        raise


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_refused(content, right):
    """Also with a right checksum, and behind a right beginning."""
    beginning = FIXED.pack(b"CAPSMEM\n", 1, PAGE, PAGE, 1, 0, 1, BUILDS[0].bytes, NIL.bytes)
    for harmed in (content, signed(content), signed(beginning + content) if right else beginning + content):
        header = decoded(harmed)
        assert header is None or header.encode() == harmed


words = st.one_of(
    st.integers(0, 8).map(lambda each: each * PAGE),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 1, PAGE - 1, 1 << 42, (1 << 64) - PAGE, (1 << 64) - 1]),
)


@settings(max_examples=400)
@given(headers(), st.lists(st.tuples(st.integers(0, 60), words), min_size=1, max_size=4))
def test_inconsistent_headers_with_a_right_checksum_are_refused(header, changes):
    """Whoever can sign still gets nothing but a valid header through: no overflow, no gap, no second encoding."""
    content = bytearray(header.encode()[:-32])
    for place, word in changes:
        position = place * 8 % (len(content) - 7)
        content[position : position + 8] = word.to_bytes(8, "little")
    harmed = signed(bytes(content))
    found = decoded(harmed)
    if found is None:
        return
    assert found.encode() == harmed
    assert (
        Header.of(
            memory_bytes=found.memory_bytes,
            generation=found.generation,
            build=found.build,
            parent=found.parent,
            runs=found.runs,
        )
        == found
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, PAGE, BUILDS[0], 0)], "cover"),
        ([(PAGE, PAGE, BUILDS[0], 0)], "cover"),
        ([(0, PAGE, BUILDS[0], 0), (2 * PAGE, PAGE, BUILDS[0], 0)], "cover"),
        ([(0, 2 * PAGE, BUILDS[0], 0), (PAGE, PAGE, BUILDS[1], 0)], "cover"),
        ([(0, 0, BUILDS[0], 0), (0, 2 * PAGE, BUILDS[1], 0)], "cover"),
        ([(0, 2 * PAGE, BUILDS[0], 0), (2 * PAGE, 0, BUILDS[1], 0)], "cover"),
        ([(0, (1 << 64) - PAGE, BUILDS[0], 0), ((1 << 64) - PAGE, 3 * PAGE, BUILDS[1], 0)], "cover"),
        ([(0, 100, BUILDS[0], 0), (100, 2 * PAGE - 100, BUILDS[1], 0)], "whole pages"),
        ([(0, 2 * PAGE, BUILDS[0], 1)], "whole pages"),
        ([(0, 2 * PAGE, BUILDS[0], 1 << 42)], "outside"),
        ([(0, 2 * PAGE, NIL, PAGE)], "zeros"),
        ([(0, PAGE, NIL, 0), (PAGE, PAGE, NIL, 0)], "one"),
        ([(0, PAGE, BUILDS[0], 0), (PAGE, PAGE, BUILDS[0], PAGE)], "one"),
    ],
)
def test_each_inconsistency_has_its_reason(rows, message):
    """Every rule on runs, broken alone under a right checksum."""
    content = FIXED.pack(b"CAPSMEM\n", 1, PAGE, 2 * PAGE, 1, 0, len(rows), BUILDS[0].bytes, NIL.bytes)
    for offset, length, build, data in rows:
        content += struct.pack("<QQ16sQ", offset, length, build.bytes, data)
    with pytest.raises(HeaderDamaged, match=message):
        Header.decode(signed(content), name="f")


def test_a_count_that_lies_costs_no_memory():
    """2^60 entries in a file of a few bytes, and the most that a field can say."""
    for count in (0, 1 << 22, 1 << 60, (1 << 64) - 1):
        content = FIXED.pack(b"CAPSMEM\n", 1, PAGE, 1 << 42, 1, 0, count, BUILDS[0].bytes, NIL.bytes)
        tracemalloc.start()
        try:
            with pytest.raises(HeaderDamaged, match=r"f is damaged \(.*entries"):
                Header.decode(signed(content), name="f")
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


def test_the_file_has_the_documented_layout():
    """Byte by byte as header_format.py says: other programs may read it."""
    header = Header.of(
        memory_bytes=3 * PAGE,
        generation=7,
        build=BUILDS[0],
        parent=BUILDS[1],
        runs=[Run(0, PAGE, NIL, 0), Run(PAGE, 2 * PAGE, BUILDS[0], 5 * PAGE)],
    )
    content = b"CAPSMEM\n" + struct.pack("<IIQIIQ", 1, 4096, 3 * PAGE, 7, 0, 2) + BUILDS[0].bytes + BUILDS[1].bytes
    content += struct.pack("<QQ", 0, PAGE) + bytes(16) + struct.pack("<Q", 0)
    content += struct.pack("<QQ", PAGE, 2 * PAGE) + BUILDS[0].bytes + struct.pack("<Q", 5 * PAGE)
    assert header.encode() == content + hashlib.sha256(content).digest()
