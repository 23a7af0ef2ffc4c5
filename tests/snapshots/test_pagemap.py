"""What the kernel says about pages, on this machine's kernel."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.snapshots import pagemap
from agent.snapshots.pagemap import PAGE, Mapping

SIZE = 64 * PAGE
PARENT = b"".join(bytes([1 + page]) * PAGE for page in range(64))


def everything(process, pieces=1):
    """The memory as `pieces` mappings."""
    length = process.size // pieces
    return [Mapping(process.memory.address + at, length, at) for at in range(0, process.size, length)]


def written(process, *, pieces=1, reset=False):
    return pagemap.written(process.memory.pid, everything(process, pieces), reset=reset)


def pages(*numbers):
    return [(first * PAGE, count * PAGE) for first, count in numbers]


def test_written_is_what_was_written_by_anybody_in_the_process(run_with_memory, tracking):
    """Fetched pages are not, pages that the kernel filled are, and a fork of the process changes nothing."""
    process = run_with_memory(parent=PARENT)
    assert written(process) == ([], [])
    process.do("read", 0, 20 * PAGE)
    assert written(process) == ([], [])
    process.do("write", 2 * PAGE, 2 * PAGE, 0)
    process.do("receive", 40 * PAGE, 3 * PAGE, 7)  # pages that are not even there
    process.do("fork", 10 * PAGE, PAGE, 7)
    process.do("write", 11 * PAGE, PAGE, 7)
    assert written(process) == (pages((2, 2), (10, 2), (40, 3)), [])


def test_a_forked_child_writes_unseen(run_with_memory, tracking):
    """A limit of the kernel's: why VMMs keep guest memory from their children (QEMU does, by MADV_DONTFORK)."""
    process = run_with_memory(parent=PARENT)
    process.do("read", 0, PAGE)
    process.do("fork_and_write", 0, PAGE, 7)
    assert written(process) == ([], [])


def test_reset_forgets_and_counts_anew(run_with_memory, tracking):
    """After a reset nothing is written, and what is written then is seen, a second time too."""
    process = run_with_memory(SIZE)
    for number in range(3):
        process.do("write", number * PAGE, 4 * PAGE, 7)
        assert written(process, reset=True) == (pages((number, 4)), [])
        assert written(process) == ([], [])


def test_every_region_is_found_whatever_the_kernel_can_tell_at_once(run_with_memory, tracking, monkeypatch):
    """More regions than an answer holds, several mappings; and the reset reaches as far."""
    process = run_with_memory(SIZE)
    for page in range(0, 64, 2):
        process.do("write", page * PAGE, PAGE, 7)
    process.do("write", 30 * PAGE, 5 * PAGE, 7)
    expected = pages(*((page, 1) for page in range(0, 30, 2)), (30, 5), *((page, 1) for page in range(36, 64, 2)))
    for at_once in (1, 3, 4096):
        monkeypatch.setattr(pagemap, "REGIONS_AT_ONCE", at_once)
        for pieces in (1, 2, 32):
            assert written(process, pieces=pieces) == (expected, [])
    monkeypatch.setattr(pagemap, "REGIONS_AT_ONCE", 1)
    assert written(process, reset=True) == (expected, [])
    assert written(process) == ([], [])


def test_mappings_of_any_order_and_place_give_offsets_in_the_file(run_with_memory, tracking):
    """A guest's memory may be cut in two (below and above a hole for devices), at addresses in any order."""
    process = run_with_memory(SIZE)
    process.do("write", 31 * PAGE, 2 * PAGE, 7)
    first, second = everything(process, 2)
    swapped = [Mapping(first.address, first.length, second.offset), Mapping(second.address, second.length, 0)]
    assert pagemap.written(process.memory.pid, swapped) == (pages((0, 1), (63, 1)), [])


def test_no_write_falls_between_the_answer_and_the_reset(run_with_memory, tracking):
    """A copy that takes what is reported, while the process writes every page once, ends up complete.

    Each write is the last one of its page for a while, so none that is missed is made good by another.
    """
    size = 4096 * PAGE
    process = run_with_memory(size)
    copy = bytearray(size)

    def take() -> int:
        there, _ = written(process, reset=True)
        for offset, length in there:
            copy[offset : offset + length] = os.pread(process.memory.fd, length, offset)
        return sum(length for _, length in there) // PAGE

    partial = 0
    for _ in range(300):
        writer = threading.Thread(target=process.ask, args=("storm", 0, size, 1))
        writer.start()
        while writer.is_alive():
            partial += 0 < take() < 4096
        writer.join()
        take()
        assert copy == os.pread(process.memory.fd, size, 0)
        if partial > 100:
            break
    assert partial > 100


def test_pages_that_were_never_there_are_told_apart(run_with_memory, tracking):
    """Without write protection of the whole the kernel calls them written: that is noise, and told apart."""
    process = run_with_memory(parent=PARENT, whole=False)
    process.do("write", 0, PAGE, 7)
    there, elsewhere = written(process)
    assert there == pages((0, 1))
    assert elsewhere == pages((16, 48))


def test_memory_that_is_not_armed_is_told(run_with_memory):
    """Everything and nothing would both be wrong answers."""
    process = run_with_memory(SIZE, modes=0)
    with pytest.raises((pagemap.NotTracked, pagemap.ScanUnsupported)):
        written(process)


def test_a_kernel_without_the_scan_is_told(run_with_memory, no_scan):
    """Which pages are mapped is known all the same."""
    process = run_with_memory(SIZE)
    with pytest.raises(pagemap.ScanUnsupported, match=r"6\.7"):
        written(process)
    process.do("write", 3 * PAGE, PAGE, 7)
    assert pagemap.mapped(process.memory.pid, everything(process)) == pages((3, 1))


def test_mapped_pages_are_the_same_by_either_interface(run_with_memory, monkeypatch):
    """On any kernel; not what others put into the file, nor what was write-protected before it was there."""
    process = run_with_memory(parent=PARENT)
    process.do("read", 0, PAGE)
    process.do("write", 63 * PAGE, PAGE, 7)
    os.pwrite(process.writable, PARENT[32 * PAGE : 40 * PAGE], 32 * PAGE)
    process.do("read", 35 * PAGE, 2 * PAGE)
    expected = pages((0, 16), (35, 2), (48, 16))
    for at_once in (5, 1 << 16):
        monkeypatch.setattr(pagemap, "_ENTRIES_AT_ONCE", at_once)
        for pieces in (1, 4):
            mappings = everything(process, pieces)
            assert pagemap.mapped(process.memory.pid, mappings) == expected
            assert pagemap.mapped_by_entries(process.memory.pid, mappings) == expected


def test_a_process_that_is_gone_is_told(run_with_memory):
    """Dead and waited for, or dead and not yet."""
    process = run_with_memory(SIZE)
    ended = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    for ask in (pagemap.mapped, pagemap.mapped_by_entries, pagemap.written):
        with pytest.raises(pagemap.ProcessGone):
            ask(ended.pid, everything(process))
    ended.wait()
    for ask in (pagemap.mapped, pagemap.mapped_by_entries, pagemap.written):
        with pytest.raises(pagemap.ProcessGone):
            ask(ended.pid, everything(process))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6))))
def test_merged_ranges_are_the_same_pages_once_in_order(ranges):
    """Against sets of pages; neighbours are one range."""
    merged = pagemap.merge(ranges)
    assert [at for offset, length in merged for at in range(offset, offset + length)] == sorted(
        {at for offset, length in ranges for at in range(offset, offset + length)}
    )
    assert all(first + length < second for (first, length), (second, _) in itertools.pairwise(merged))
