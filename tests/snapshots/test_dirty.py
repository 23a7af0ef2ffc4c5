"""Both ways to find dirty pages: neither misses one, they agree, and neither touches the memory."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from agent.snapshots import pagemap
from agent.snapshots.capture import grab
from agent.snapshots.dirty import ContentDirty, Descent, PagemapDirty, detect
from agent.snapshots.memory_file import data_within, holes_within
from agent.snapshots.pagemap import PAGE, merge

PAGES = 128
SIZE = PAGES * PAGE
PARENT = b"".join(bytes([page % 5 and 1 + page]) * PAGE for page in range(PAGES))
"""Every fifth page is zero."""

OPERATION = st.tuples(
    st.sampled_from(["write", "write", "receive", "read", "fork", "remove", "forget"]),
    st.integers(0, PAGES - 1),
    st.integers(1, 20),
    st.sampled_from([0, 0, 1, 2, 255]),
)
ROUND = st.tuples(st.lists(OPERATION, max_size=12), st.booleans())
ROUNDS = st.lists(ROUND, min_size=1, max_size=4)

BOUNDED = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
"""Every example starts a process: making a failing one small would take minutes."""


def page_set(ranges):
    assert ranges == merge(ranges)
    return {at for offset, length in ranges for at in range(offset, offset + length, PAGE)}


@pytest.fixture
def restored(run_with_memory, generations):
    """A process whose memory comes from a parent by page faults, with the parent."""
    return run_with_memory(parent=PARENT), generations.first(PARENT)


@pytest.fixture(params=[PagemapDirty, ContentDirty])
def tracker(request):
    """Either way; the kernel's only where the kernel has it."""
    if request.param is PagemapDirty:
        request.getfixturevalue("tracking")
    return request.param


@settings(BOUNDED, max_examples=25)
@given(rounds=ROUNDS)
def test_no_page_is_missed_over_generations_of_a_restored_memory(run_with_memory, generations, rounds):
    """Random operations, pauses with and without a new parent: what is captured is what the process has.

    Every round: each way finds every page that differs; content finds nothing else, the kernel's answer also pages
    that were written with what they had; neither takes fetched pages for dirty, and neither brings a page.
    """
    process = run_with_memory(parent=PARENT)
    parent = generations.first(PARENT)
    touched: set[int] = set()  # since the kernel counts anew
    for operations, follow in rounds:
        base = parent.read(0, SIZE)
        touched |= perform(process, operations)
        blocks = process.blocks()
        descent = Descent(parent, demand_paged=True, removed=list(process.removed))
        removed = page_set(merge(process.removed))
        results = {}
        for kind in trackers(process):
            ranges = kind(process.memory, descent).ranges()
            found = page_set(ranges)
            assert process.changed(base) <= found
            assert found <= (touched if kind is PagemapDirty else process.changed(base)) | removed
            results[kind] = generations.attempt(process.memory.fd, ranges, SIZE, compare=kind is PagemapDirty)
            assert generations.content(results[kind]) == process.model
        assert process.blocks() == blocks
        if follow:
            generations.follow(results[ContentDirty])
            parent = generations.reader
            if PagemapDirty in results:
                PagemapDirty(process.memory, descent).reset()
                touched.clear()
    process.do("read", 0, SIZE)
    process.stop()


@settings(BOUNDED, max_examples=15)
@given(rounds=ROUNDS)
def test_no_page_is_missed_over_generations_of_a_booted_memory(run_with_memory, generations, rounds):
    """The same where a hole is zero, and the first generation has no parent."""
    process = run_with_memory(SIZE)
    generations.reader = None
    removed = []
    for operations, follow in rounds:
        parent = generations.reader
        base = parent.read(0, SIZE) if parent else bytes(SIZE)
        perform(process, operations)
        removed += [(page * PAGE, span(page, count)) for name, page, count, _ in operations if name == "remove"]
        blocks = process.blocks()
        results = {}
        for kind in trackers(process):
            told = removed if kind is PagemapDirty else []
            dirty = kind(process.memory, Descent(parent, demand_paged=False, removed=told))
            ranges = dirty.take() if follow else dirty.ranges()
            assert process.changed(base) <= page_set(ranges)
            assert parent is None or kind is PagemapDirty or process.changed(base) == page_set(ranges)
            results[kind] = generations.attempt(process.memory.fd, ranges, SIZE, compare=not dirty.exact)
            assert generations.content(results[kind]) == process.model
        assert process.blocks() == blocks
        if follow:
            generations.follow(results[ContentDirty])
    process.stop()


def trackers(process):
    return [PagemapDirty, ContentDirty] if detect(process.memory) is PagemapDirty else [ContentDirty]


def span(page, count):
    return min(count, PAGES - page) * PAGE


def perform(process, operations):
    """Let the process do it; returns the pages it wrote."""
    touched = set()
    for name, page, count, byte in operations:
        process.do(name, page * PAGE, span(page, count), byte)
        if name != "read":
            touched |= set(range(page * PAGE, page * PAGE + span(page, count), PAGE))
    return touched


def test_resident_is_not_dirty(restored, tracker, generations):
    """A page that was only brought is the parent's."""
    process, parent = restored
    process.do("read", 0, SIZE)
    assert list(data_within(process.memory.fd, [(0, SIZE)])) == [(0, SIZE)]
    assert tracker(process.memory, Descent(parent, demand_paged=True)).ranges() == []
    process.do("write", 7 * PAGE, PAGE, 255)
    ranges = tracker(process.memory, Descent(parent, demand_paged=True)).ranges()
    assert ranges == [(7 * PAGE, PAGE)]
    assert generations.take(process.memory.fd, ranges, SIZE).pages_written == 1


def test_zeroed_pages_come_back_zero(restored, tracker, generations):
    """Written with zeros, or removed: explicit in the header, and without data."""
    process, parent = restored
    process.do("write", PAGE, 3 * PAGE, 0)
    process.do("remove", 41 * PAGE, PAGE)
    process.do("remove", 82 * PAGE, PAGE)  # never brought
    dirty = tracker(process.memory, Descent(parent, demand_paged=True, removed=list(process.removed)))
    result = generations.take(process.memory.fd, dirty.ranges(), SIZE, compare=not dirty.exact)
    assert (result.pages_written, result.pages_zero) == (0, 5)
    assert generations.content(result) == process.model


def test_pages_beyond_what_was_fetched_stay_the_parents_without_protection_of_the_whole(
    run_with_memory, tracking, generations
):
    """Where nobody write-protected the whole memory, the kernel calls holes written; zeros they are not."""
    process = run_with_memory(parent=PARENT, whole=False)
    process.do("write", 0, PAGE, 7)
    dirty = PagemapDirty(process.memory, Descent(generations.first(PARENT), demand_paged=True))
    assert dirty.ranges() == [(0, PAGE)]


def test_looking_at_a_memory_brings_nothing(restored, tracker, generations, tmp_path):
    """A page that is looked at must still be missing to its VM, or it would find zeros there."""
    process, parent = restored
    process.do("write", 0, PAGE, 7)
    blocks = process.blocks()
    dirty = tracker(process.memory, Descent(parent, demand_paged=True, removed=[(0, SIZE)]))
    ranges = dirty.take()
    with (tmp_path / "grabbed").open("wb") as file:
        grab(process.memory, [(0, SIZE)], file.fileno())
    generations.attempt(process.memory.fd, [(0, SIZE)], SIZE)
    assert page_set(ranges)
    assert process.blocks() == blocks
    process.do("read", 0, SIZE)


def test_after_a_failed_checkpoint_the_content_still_tells(restored, tracking):
    """Taken, but never stored: the kernel has forgotten, the content has not. That is what the note is for."""
    process, parent = restored
    process.do("write", 5 * PAGE, PAGE, 7)
    descent = Descent(parent, demand_paged=True)
    assert PagemapDirty(process.memory, descent).take() == [(5 * PAGE, PAGE)]
    assert PagemapDirty(process.memory, descent).ranges() == []
    assert ContentDirty(process.memory, descent).ranges() == [(5 * PAGE, PAGE)]


def test_the_kernels_way_is_taken_where_it_works(restored, tracking):
    """Here."""
    assert detect(restored[0].memory) is PagemapDirty


def test_content_is_compared_on_a_kernel_without_the_scan(restored, no_scan):
    """Before 6.7."""
    assert detect(restored[0].memory) is ContentDirty


def test_content_is_compared_where_memory_is_not_armed(run_with_memory):
    """A VMM that could not arm it: on kernels without asynchronous write protection."""
    assert detect(run_with_memory(SIZE, modes=0).memory) is ContentDirty


def test_a_vmm_that_is_gone_is_no_answer(run_with_memory):
    """Neither way: its memory may be there, but what it was nobody knows."""
    process = run_with_memory(SIZE)
    process.stop()
    with pytest.raises(pagemap.ProcessGone):
        detect(process.memory)


def test_without_a_parent_everything_that_is_there_is_dirty(run_with_memory, tracker):
    """A booted VM's first generation; the rest of its memory is zeros."""
    process = run_with_memory(SIZE)
    process.do("write", 3 * PAGE, PAGE, 7)
    dirty = tracker(process.memory, Descent(None, demand_paged=False))
    assert not dirty.exact
    assert dirty.ranges() == dirty.take() == [(3 * PAGE, PAGE)]
    process.do("write", 5 * PAGE, PAGE, 7)
    assert dirty.ranges() == [(3 * PAGE, PAGE), (5 * PAGE, PAGE)]


@given(
    present=st.sets(st.integers(0, 31)),
    ranges=st.lists(st.tuples(st.integers(0, 31), st.integers(1, 12)), max_size=8),
)
def test_data_and_holes_of_parts_of_a_file(present, ranges):
    """Against sets of pages, with parts that reach beyond the end of the data."""
    wanted = merge((page * PAGE, count * PAGE) for page, count in ranges)
    with ExitStack() as undo:
        descriptor = os.memfd_create("sparse")
        undo.callback(os.close, descriptor)
        os.ftruncate(descriptor, 48 * PAGE)
        for page in present:
            os.pwrite(descriptor, b"x", page * PAGE)
        data = page_set(merge(data_within(descriptor, wanted)))
        holes = page_set(merge(holes_within(descriptor, wanted)))
    there = {page * PAGE for page in present}
    assert data == page_set(wanted) & there
    assert holes == page_set(wanted) - there
