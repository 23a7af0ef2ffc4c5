"""Every answer that the kernel can give to UFFDIO_COPY, from a kernel that gives them at will."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.pager.abi import COPY_MODE_WP
from agent.pager.faults import ABSENT, PRESENT, PageMap
from agent.pager.filling import Again, FaultUnserved, Filler, OutOfMemory, Staging, VmGone
from agent.pager.regions import Region

PAGE = 4096
REGION = Region(1 << 30, 64 * PAGE, 0)


class Kernel:
    """Pages of a VMM; `moods` are answers to give instead of copying everything."""

    def __init__(self, moods=(), present=(), *, wp=True, unmapped=()):
        self.moods = list(moods)
        self.pages = dict.fromkeys(present, "theirs")
        self.wp = wp
        self.unmapped = set(unmapped)
        self.woken = set()
        self.calls = 0

    def copy(self, address, source, length, mode):
        self.calls += 1
        assert self.calls < 1000
        mood = self.moods.pop(0) if self.moods else None
        if isinstance(mood, int):
            return 0, mood
        if mode == COPY_MODE_WP and not self.wp:
            return 0, errno.EINVAL
        first = (address - REGION.address) // PAGE
        if any(first + i in self.unmapped for i in range(length // PAGE)):
            return 0, errno.ENOENT
        most = mood[0] if mood else length // PAGE
        for done in range(min(most, length // PAGE)):
            page = first + done
            if page in self.pages:
                return (done * PAGE, errno.EAGAIN) if done else (0, errno.EEXIST)
            self.pages[page] = (source + done * PAGE, mode)
            self.woken.add(page)
        done = min(most, length // PAGE)
        return done * PAGE, 0 if done * PAGE == length else errno.EAGAIN

    def wake(self, address, length):
        self.woken.update((address - REGION.address) // PAGE + i for i in range(length // PAGE))


def fill(kernel, first, count):
    pages = PageMap(REGION.size)
    Filler(kernel, pages, Staging()).bring(REGION, first, count, 1 << 40)
    return pages


@given(
    st.lists(st.integers(1, 5).map(lambda count: (count,)), max_size=10),
    st.sets(st.integers(0, 63)),
    st.integers(0, 60),
    st.integers(1, 4),
)
def test_parts_and_pages_that_are_there_end_in_everything_there(moods, present, first, count):
    """However the copy is cut, and whatever is there already: every page is there, ours with its own content, theirs
    untouched; whoever waits is woken."""
    kernel = Kernel(moods, present)
    pages = fill(kernel, first, count)
    for page in range(first, first + count):
        assert pages.state(page) == PRESENT
        assert kernel.pages[page] == "theirs" or kernel.pages[page] == ((1 << 40) + (page - first) * PAGE, COPY_MODE_WP)
        assert page in kernel.woken
    assert all(kernel.pages[page] == "theirs" for page in present)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EAGAIN, Again),
        (errno.ENOMEM, OutOfMemory),
        (errno.ENOSPC, OutOfMemory),
        (errno.ESRCH, VmGone),
        (errno.EFAULT, FaultUnserved),
        (errno.EPERM, FaultUnserved),
    ],
)
def test_what_cannot_be_copied_says_why_and_keeps_what_was(number, error):
    """The first page arrived, the second did not: only the first is marked."""
    kernel, pages = Kernel([(1,), number]), PageMap(REGION.size)
    filler = Filler(kernel, pages, Staging())
    with pytest.raises(error):
        filler.bring(REGION, 4, 3, 0)
    assert [pages.state(page) for page in (4, 5, 6)] == [PRESENT, ABSENT, ABSENT]
    assert filler.bytes == PAGE


def test_memory_without_write_protection_is_filled_without_it():
    """Found out once, by EINVAL; an EINVAL that has another cause is no endless loop."""
    kernel = Kernel(wp=False)
    assert fill(kernel, 0, 4).state(3) == PRESENT
    with pytest.raises(FaultUnserved):
        fill(Kernel([errno.EINVAL] * 9), 0, 1)


def test_a_neighbour_that_was_unmapped_keeps_nothing_from_the_others():
    """The kernel refuses the whole range then; each page is tried alone. Whoever waited for the one that is gone is
    woken."""
    kernel = Kernel(unmapped=[6])
    pages = fill(kernel, 4, 4)
    assert [pages.state(page) for page in range(4, 8)] == [PRESENT, PRESENT, ABSENT, PRESENT]
    assert kernel.pages[7][0] == (1 << 40) + 3 * PAGE
    assert 6 in kernel.woken


def test_zeros_count_as_written():
    """They are brought without write protection: not what the snapshot has there."""
    kernel, zeros = Kernel(), Staging()
    Filler(kernel, PageMap(REGION.size), zeros).zero(REGION, 2, 2)
    assert kernel.pages == {2: (zeros.address, 0), 3: (zeros.address + PAGE, 0)}
