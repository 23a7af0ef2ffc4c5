"""A guest's memory found in /proc, of processes that are honest and of those that are not."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.vmm.driver import VmCommandFailed, VmGone
from agent.vmm.guest_memory import find_memory, has_userfaultfd

SIZE = 1 << 20

PRELUDE = """
import mmap, os, sys
def memory(size, name="memory-backend-memfd"):
    fd = os.memfd_create(name)
    os.ftruncate(fd, size)
    return fd
"""
CLOSE_COPIES = """
for number in range(3, 20):  # Python's mmap keeps a descriptor of its own
    if number != globals().get("other"):
        try:
            os.close(number)
        except OSError:
            pass
"""
READY = "\nprint('ready', flush=True)\nsys.stdin.read()\n"


@pytest.fixture
def process():
    """Starts a process that does something and then waits; returns its pid."""
    started = []

    def start(body):
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PRELUDE + body + READY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(child)
        assert child.stdout.readline() == b"ready\n"
        return child.pid

    yield start
    for child in started:
        child.stdin.close()
        child.wait()
        child.stdout.close()


def test_memory_is_found(process):
    """Where it is mapped, and what is in it."""
    pid = process(f"fd = memory({SIZE}); m = mmap.mmap(fd, {SIZE}); m[4096:4101] = b'hello'")
    memory = find_memory(pid, SIZE)
    assert os.pread(memory.fd, 5, 4096) == b"hello"
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as raw:
        raw.seek(memory.address + 4096)
        assert raw.read(5) == b"hello"
    os.close(memory.fd)


def test_a_mapping_in_pieces_is_one(process):
    """The kernel shows a mapping in pieces once parts of it are treated differently."""
    pid = process(f"fd = memory({SIZE}); m = mmap.mmap(fd, {SIZE}); m.madvise(mmap.MADV_DONTFORK, 4096, 8192)")
    memory = find_memory(pid, SIZE)
    os.close(memory.fd)
    assert Path(f"/proc/{pid}/maps").read_text().count("memory-backend") == 3


@pytest.mark.parametrize(
    "body",
    [
        "",
        f"fd = memory({SIZE})",
        f"fd = memory({SIZE}); m = mmap.mmap(fd, {SIZE // 2})",
        f"fd = memory({SIZE}, 'other'); m = mmap.mmap(fd, {SIZE})",
        f"fd = memory({SIZE}); m = mmap.mmap(fd, {SIZE}, prot=mmap.PROT_READ)",
        f"fd = memory({SIZE}); m = mmap.mmap(fd, {SIZE}); os.close(fd)",
        f"fd = memory({SIZE}); m = mmap.mmap(fd, {SIZE}); os.ftruncate(fd, 4096)",
        f"fd = memory({SIZE}); m = mmap.mmap(fd, {SIZE}); os.close(fd); other = memory({SIZE})",
    ],
    ids=["nothing", "unmapped", "half", "other name", "read only", "closed", "cut", "exchanged"],
)
def test_what_is_not_the_guests_memory_is_refused(process, body):
    """No mapping of that size, no file behind it, another file than the mapped one."""
    if "os.close(fd)" in body:
        body += CLOSE_COPIES
    pid = process(body)
    gc.collect()  # what tests before this one have left
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(VmCommandFailed, match=str(pid)):
        find_memory(pid, SIZE)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_process_that_has_gone(process):
    """VmGone."""
    with subprocess.Popen(["true"]) as child:
        child.wait()
    with pytest.raises(VmGone):
        find_memory(child.pid, SIZE)
    assert not has_userfaultfd(child.pid)


def test_userfaultfd_is_seen(process):
    """By the descriptor alone."""
    assert not has_userfaultfd(process(""))
