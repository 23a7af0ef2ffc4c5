"""Decisions about faults against plain lists; following threads that read in order."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from agent.pager.faults import ABSENT, CHUNK, MOST_AHEAD, PRESENT, REMOVED, STREAMS, Action, PageMap, Streams
from agent.pager.figures import Figures
from agent.pager.service import LATENCY_BOUNDS

PAGE = 4096
PAGES = 64
IN_CHUNK = CHUNK // PAGE


@st.composite
def maps(draw):
    pages = PageMap(PAGES * PAGE)
    model = [ABSENT] * PAGES
    for first, count, state in draw(
        st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 20), st.sampled_from((0, 1, 2))), max_size=12)
    ):
        fitting = min(count, PAGES - first)
        pages.mark(first, fitting, state)
        model[first : first + fitting] = [state] * fitting
    return pages, model


@given(maps(), st.integers(0, PAGES - 1), st.integers(0, 40), st.integers(0, 40))
def test_a_fault_brings_what_is_absent_around_it(made, page, before, after):
    """Exactly the absent pages of its chunk and its region, itself among them; a page that was given back brings its
    like as zeros; a page that is there brings nothing else."""
    pages, model = made
    low, high = max(0, page - before), min(PAGES, page + 1 + after)
    action, runs = pages.decide(page, low, high)
    brought = [each for first, count in runs for each in range(first, first + count)]
    assert brought == sorted(set(brought))
    assert page in brought
    chunk = range(max(low, page // IN_CHUNK * IN_CHUNK), min(high, (page // IN_CHUNK + 1) * IN_CHUNK))
    if model[page] == ABSENT:
        assert action is Action.BRING
        assert brought == [each for each in chunk if model[each] == ABSENT]
    elif model[page] == REMOVED:
        assert action is Action.ZERO
        assert all(model[each] == REMOVED and each in chunk for each in brought)
    else:
        assert (action, brought) == (Action.PROBE, [page])


@given(maps(), st.sampled_from((ABSENT, PRESENT, REMOVED)), st.integers(0, PAGES), st.integers(0, PAGES))
def test_runs_are_maximal_and_complete(made, state, one, other):
    pages, model = made
    first, end = sorted((one, other))
    runs = list(pages.runs(state, first, end))
    assert [each for at, count in runs for each in range(at, at + count)] == [
        each for each in range(first, end) if model[each] == state
    ]
    assert all(a + n < b for (a, n), (b, _) in pairwise(runs))


def test_a_thread_that_reads_in_order_is_brought_more_each_time():
    """Nothing ahead at first; then twice as far with every right guess, up to a bound."""
    streams, chunk, seen = Streams(), 10, []
    for _ in range(7):
        ahead = streams.ahead(chunk)
        assert ahead.start == chunk + 1
        seen.append(len(ahead))
        chunk = ahead.stop
    assert seen == [0, 2, 4, 8, MOST_AHEAD, MOST_AHEAD, MOST_AHEAD]


def test_several_threads_are_followed_and_strangers_forgotten():
    """As many as STREAMS at once; reads all over the place bring nothing and hold no memory."""
    streams = Streams()
    starts = [1000 * number for number in range(STREAMS)]
    for start in starts:
        assert not streams.ahead(start)
    assert all(len(streams.ahead(start + 1)) == 2 for start in starts)
    assert not any(streams.ahead(chunk * 7919 % 100_003) for chunk in range(1000))
    assert len(streams._expected) <= STREAMS


def test_latencies_fall_into_their_buckets():
    """Bounds belong to the bucket below them; the quantile is the bucket's bound."""
    figures = Figures()
    for seconds in (0.0, LATENCY_BOUNDS[0], 0.00007, 0.0003, 99.0):
        figures.answered(seconds)
    statistics = figures.snapshot(connected=True)
    assert statistics.latency[:4] == (2, 1, 0, 1)
    assert statistics.latency[-1] == 1
    assert statistics.latency_quantile(0.5) == LATENCY_BOUNDS[1]
    assert statistics.latency_quantile(1) == float("inf")
    assert Figures().snapshot(connected=False).latency_quantile(0.5) == 0
