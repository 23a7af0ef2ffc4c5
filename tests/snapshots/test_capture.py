"""Generations of a memory: what is in them, what is left out, and what happens when something is in the way."""

from __future__ import annotations

import errno
import itertools
import os
import tracemalloc
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.snapshots import capture as module
from agent.snapshots.capture import capture, grab
from agent.snapshots.comparison import BUFFER_BYTES, GAP, PIECE, spans
from agent.snapshots.dirty import ContentDirty, Descent
from agent.snapshots.errors import DataDamaged, HostDiskFull, StoreFailed, WouldBlock
from agent.snapshots.memory_file import SourceUnreadable, data_within
from agent.snapshots.pagemap import PAGE, merge

PAGES = 2 * BUFFER_BYTES // PAGE + 5
SIZE = PAGES * PAGE
PER_PIECE = PIECE // PAGE


@pytest.fixture
def file():
    """Makes a memory file of a content; pages of zeros are holes."""
    with ExitStack() as undo:

        def make(content: bytes) -> int:
            descriptor = os.memfd_create("memory")
            undo.callback(os.close, descriptor)
            os.ftruncate(descriptor, len(content))
            for at in range(0, len(content), PAGE):
                if any(page := content[at : at + PAGE]):
                    os.pwrite(descriptor, page, at)
            return descriptor

        yield make


def content_of(numbers):
    """A memory whose pages are filled with these; what makes a page what it is stands in its last byte."""
    return b"".join(bytes(PAGE - 1) + bytes([number]) for number in numbers)


STRETCHES = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([1, 1, 2, 3, PER_PIECE, 3 * PER_PIECE])), min_size=1, max_size=30
)
"""(what a page is filled with, how many of them): single pages and whole pieces, at any place."""


def pages_of(stretches):
    numbers = [number for number, count in stretches for _ in range(count)]
    return (numbers * PAGES)[:PAGES]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(old=STRETCHES, new=STRETCHES, more=st.sets(st.integers(0, PAGES - 1)), compare=st.booleans())
def test_a_generation_is_the_memory_and_only_what_changed(file, generations, old, new, more, compare):
    """Against plain lists of pages, with ranges that have more than what changed."""
    before, after = pages_of(old), pages_of(new)
    generations.first(content_of(before))
    differ = {page for page in range(PAGES) if before[page] != after[page]}
    ranges = merge((page * PAGE, PAGE) for page in (differ | more if compare else differ))
    result = generations.attempt(file(content_of(after)), ranges, SIZE, compare=compare)
    assert generations.content(result) == content_of(after)
    zeroed = {page for page in differ if not after[page]}
    assert result.pages_written == len(differ - zeroed)
    assert result.pages_zero == len(zeroed)
    assert result.pages_equal == (len(more - differ) if compare else 0)
    data = generations.builds / str(result.header.build) / "data"
    assert data.stat().st_size == result.pages_written * PAGE


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(new=STRETCHES)
def test_the_first_generation_is_what_is_there(file, generations, new):
    """No parent: pages of zeros take no data, holes take not even reading."""
    generations.reader = None
    content = content_of(pages_of(new))
    source = file(content)
    result = generations.attempt(source, list(data_within(source, [(0, SIZE)])), SIZE)
    assert generations.content(result) == content
    assert (result.header.generation, result.pages_equal, result.pages_zero) == (1, 0, 0)
    whole = generations.attempt(source, [(0, SIZE)], SIZE)
    assert generations.content(whole) == content
    assert whole.pages_written == result.pages_written


@given(ranges=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 80)), max_size=12))
def test_spans_are_the_ranges_in_pieces_that_fit(ranges):
    """The same pages in the same order, and gaps that are read are short."""
    ranges = merge((page * PAGE, count * PAGE) for page, count in ranges)
    found = []
    for offset, parts in spans(ranges):
        assert parts[0][0] == 0
        assert parts[-1][1] <= BUFFER_BYTES
        assert all(0 < second[0] - first[1] <= GAP for first, second in itertools.pairwise(parts))
        found += [(offset + start, end - start) for start, end in parts]
    assert found == sorted(found)
    assert merge(found) == ranges


class SlowParent:
    """Nothing of it is in the page cache."""

    def __init__(self, reader):
        self.reader = reader
        self.reads = 0

    def read_into(self, offset, buffer, *, wait=True):
        if not wait:
            raise WouldBlock
        self.reads += 1
        self.reader.read_into(offset, buffer)


def test_a_parent_that_is_on_disk_is_read_while_that_is_quick(file, generations, monkeypatch):
    """Then what cannot be compared is taken for changed: the pause does not wait for it, and nothing is wrong."""
    before, after = content_of([1] * PAGES), content_of([1] * (PAGES - 1) + [0])
    slow = SlowParent(generations.first(before))
    generations.reader = slow
    slow.header = slow.reader.header
    for patience, reads, written in ((1e9, 3, 0), (0, 0, PAGES - 1)):
        monkeypatch.setattr(module, "PATIENCE", patience)
        slow.reads = 0
        result = generations.attempt(file(after), [(0, SIZE)], SIZE)
        assert generations.content(result) == after
        assert (slow.reads, result.pages_written, result.pages_zero) == (reads, written, 1)
    monkeypatch.setattr(module, "PATIENCE", 1e-9)
    monkeypatch.setattr(module, "SLOW_PARENT", 1e15)
    slow.reads = 0
    assert generations.content(generations.attempt(file(after), [(0, SIZE)], SIZE)) == after
    assert slow.reads == 1


def test_a_damaged_parent_is_told(file, generations):
    """Compared with what is not the parent, pages would be dropped that are nobody's."""
    parent = generations.first(content_of([1] * PAGES))
    data = generations.builds / str(parent.header.build) / "data"
    data.chmod(0o600)
    with data.open("r+b") as damaged:
        damaged.seek(5 * PAGE)
        damaged.write(b"!")
    with pytest.raises(DataDamaged, match=str(parent.header.build)):
        generations.attempt(file(content_of([2] * PAGES)), [(0, SIZE)], SIZE)


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 2 * PAGE), (PAGE, PAGE)],
        [(PAGE, PAGE), (0, PAGE)],
        [(1, PAGE)],
        [(0, 1)],
        [(0, 0)],
        [(-PAGE, PAGE)],
        [(SIZE - PAGE, 2 * PAGE)],
    ],
)
def test_ranges_that_are_none_are_refused(file, generations, ranges):
    """Overlapping, out of order, no whole pages, nothing, outside."""
    with pytest.raises(ValueError, match="range"):
        generations.attempt(file(content_of([1] * PAGES)), ranges, SIZE)


def test_a_full_disk_ends_the_capture(file, generations):
    """The writer says it; nothing here hides it."""

    class FullDisk:
        build = generations.first(content_of([1] * PAGES)).header.build

        def append(self, data):
            raise HostDiskFull("full")

    with pytest.raises(HostDiskFull):
        capture(file(content_of([2] * PAGES)), [(0, SIZE)], None, None, FullDisk(), SIZE)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, HostDiskFull), (errno.EIO, StoreFailed)])
def test_a_grab_that_fails_says_why(run_with_memory, file, monkeypatch, number, kind):
    """The checkpoint is given up then, and the VM goes on."""

    def sendfile(*_arguments):
        raise OSError(number, os.strerror(number))

    process = run_with_memory(SIZE)
    monkeypatch.setattr(os, "sendfile", sendfile)
    with pytest.raises(kind):
        grab(process.memory, [(0, SIZE)], file(b""))


def test_what_was_grabbed_is_captured_while_the_process_goes_on(run_with_memory, generations, tmp_path):
    """What it writes after the grab is not in the generation; the file has holes where nothing was grabbed."""
    parent = content_of([1 + page % 200 for page in range(PAGES)])
    process = run_with_memory(parent=parent)
    base = generations.first(parent)
    process.do("write", 3 * PAGE, 20 * PAGE, 255)
    process.do("write", 100 * PAGE, PAGE, 0)
    ranges = ContentDirty(process.memory, Descent(base, demand_paged=True)).ranges()
    then = bytes(process.model)
    with (tmp_path / "grabbed").open("w+b") as target:
        grab(process.memory, ranges, target.fileno())
        process.do("write", 0, 30 * PAGE, 9)
        process.do("write", 100 * PAGE, 2 * PAGE, 9)
        status = os.fstat(target.fileno())
        assert status.st_size == SIZE
        assert status.st_blocks * 512 <= 21 * PAGE + (1 << 16)
        result = generations.take(target.fileno(), ranges, SIZE, compare=False)
    assert generations.content(result) == then
    assert (result.pages_written, result.pages_zero) == (20, 1)


def test_a_process_that_goes_on_writing_gets_a_whole_generation(run_with_memory, generations):
    """A VMM that does not stop its vCPUs harms its own snapshot only: each page is looked at once, then written."""
    process = run_with_memory(SIZE)
    generations.first(bytes(SIZE))
    with process.storm():
        for _ in range(10):
            result = generations.attempt(process.memory.fd, [(0, SIZE)], SIZE)
            content = generations.content(result)
            places = {int.from_bytes(content[at : at + 4], "little") for at in range(PAGE, SIZE, PAGE)}
            assert places <= set(range(0, SIZE, PAGE))
            assert result.pages_written + result.pages_equal + result.pages_zero == PAGES


def test_a_memory_that_its_vmm_cut_is_told(run_with_memory, generations, file):
    """The memory file is the VMM's, and the VMM may be the guest's."""
    process = run_with_memory(SIZE)
    os.ftruncate(process.writable, SIZE // PAGE // 2 * PAGE)
    with pytest.raises(SourceUnreadable, match="cut"):
        generations.attempt(process.memory.fd, [(0, SIZE)], SIZE)
    with pytest.raises(SourceUnreadable, match="cut"):
        grab(process.memory, [(0, SIZE)], file(b""))


def test_a_big_memory_takes_little(generations):
    """Every other page of 64 MiB changed, in 8192 ranges: a few megabytes, most of them the parent's reader."""
    size = 64 << 20
    source = os.memfd_create("memory")
    try:
        os.truncate(source, size)
        for at in range(0, size, 2 * PAGE):
            os.pwrite(source, b"x", at)
        generations.first(bytes(size))
        ranges = list(data_within(source, [(0, size)]))
        assert len(ranges) == size // PAGE // 2
        tracemalloc.start()
        try:
            result = generations.attempt(source, ranges, size)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    finally:
        os.close(source)
    assert result.pages_written == len(ranges)
    assert peak < 6 << 20
